"""Which groups are in flight, and which of them an update learns from.

Without overprovisioning these are whole batches, first in, first out, max_staleness + 1 of them. With it an update
takes the groups that finish first; the others run on, across the update, and are for the next one.
"""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from opd_ray.dispatch import Dispatcher, Flight, Place
from opd_ray.protocol import Batch, Metrics
from opd_ray.schedule import Schedule

_STATE_FILE = "window.json"
_STRIDE = 1009  # attempts at a place that one going back moves on by: the screen takes the next few itself


@dataclass(slots=True, kw_only=True)
class GroupWindow:
    """`Window` over the stream of prompts, in which place n belongs to update n // num_prompts."""

    dispatcher: Dispatcher
    schedule: Schedule
    num_prompts: int  # groups an update learns from
    overprovision: float = 0.0  # more of them in flight, as a fraction of num_prompts; 0: whole batches in order
    _flights: list[Flight] = field(default_factory=list)  # as started
    _taken: list[Flight] = field(default_factory=list)  # those of `_flights` that an update is learning from
    _again: list[int] = field(default_factory=list)  # places that a checkpoint found in flight
    _rollbacks: dict[int, int] = field(default_factory=dict)  # by update: how often its places were given other prompts
    _next: int = -1  # first place that was never started; below 0: that of the update which is filled for

    def fill(self, step: int) -> None:
        """Start as many groups as may be in flight while update `step` is waited for."""
        if self._next < 0:
            self._next = step * self.num_prompts
        room = self._capacity - len(self._flights)
        again, self._again = self._again[:room], self._again[room:]
        end = min(self._next + room - len(again), self.schedule.num_steps * self.num_prompts)
        for of, numbers in groupby([*again, *range(self._next, end)], key=lambda n: n // self.num_prompts):
            places = [Place(*divmod(n, self.num_prompts)) for n in numbers]
            attempt = _STRIDE * self._rollbacks.get(of, 0)
            self._flights += self.dispatcher.start(places, version=step, attempt=attempt)
        self._next = max(self._next, end)

    def take(self, step: int) -> tuple[Batch, Metrics]:
        """Return what update `step` learns from, finished or not, in the stream's order.

        With overprovisioning this waits until enough groups are finished. A group that would be too old for the next
        update is taken in any case.
        """
        self._taken = sorted(self._choose(step), key=lambda flight: flight.place)
        batch = Batch(
            step=step,
            groups=[flight.group for flight in self._taken],
            scores=[flight.score for flight in self._taken],
        )
        metrics = {"perf/groups_in_flight": float(len(self._flights) - len(self._taken))}
        if self.overprovision > 0:
            metrics["rollout/carried_groups"] = float(sum(flight.place.step < step for flight in self._taken))
        return batch, metrics

    def release(self) -> None:
        """Forget the groups taken last: they are learned from."""
        taken = {id(flight) for flight in self._taken}
        self._flights = [flight for flight in self._flights if id(flight) not in taken]
        self._taken = []

    def retake(self, steps: range) -> None:
        """Give the places of these updates other prompts from now on."""
        for step in steps:
            self._rollbacks[step] = self._rollbacks.get(step, 0) + 1

    def save(self, folder: str) -> None:
        """Write which places are started and not learned from."""
        in_flight = [flight.place.step * self.num_prompts + flight.place.position for flight in self._flights]
        state = {"num_prompts": self.num_prompts, "next": self._next, "in_flight": sorted(in_flight + self._again)}
        state["rollbacks"] = sorted(self._rollbacks.items())
        (Path(folder) / _STATE_FILE).write_text(json.dumps(state) + "\n")

    def restore(self, folder: str) -> None:
        """Start these places first. Raises ValueError for a checkpoint of batches of another size."""
        state = json.loads((Path(folder) / _STATE_FILE).read_text())
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"batch.num_prompts={self.num_prompts}: {folder} was written with {state['num_prompts']}, which is how"
                " its prompts are counted; expected the same"
            )
        self._next, self._again = state["next"], state["in_flight"]
        self._rollbacks = dict(state.get("rollbacks", ()))

    @property
    def _capacity(self) -> int:
        more = self.overprovision or self.schedule.max_staleness
        return self.num_prompts + int(more * self.num_prompts)

    def _choose(self, step: int) -> list[Flight]:
        if self.overprovision == 0:
            return self._flights[: self.num_prompts]
        oldest = step - self.schedule.max_staleness
        due = [flight for flight in self._flights if flight.group.request.version <= oldest]
        others = [flight for flight in self._flights if flight.group.request.version > oldest]
        finished = self.dispatcher.rollout.first(
            [flight.group for flight in others], num_groups=self.num_prompts - len(due)
        )
        return due + [others[i] for i in finished]
