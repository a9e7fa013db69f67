"""Sees workers that are gone or started anew, and ends those that hang: one that is silent for too long is dead."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.lane import DUMP_SIGNAL

_ANSWER_S = 10.0  # for a sign of life once something has failed
_DUMP_S = 2.0  # for a hung process to write its stacks
_LOOKS = 8  # in the time that a worker may be silent
_MAX_LOOK_S = 1.0
_LAST_LOOK_S = 1.0
_Place = tuple[str, int]  # node and process
_UNNAMED = {  # what is lost with a fault that all workers answer after
    ActorUnavailableError: ["a worker for a moment"],
    GetTimeoutError: ["the answer of a worker, for fault.call_timeout_s"],
}


class WorkerLost(RuntimeError):
    """Workers are gone, and others may wait for them without end: the pools must be opened anew."""

    def __init__(self, names: list[str], *, cause: RayError) -> None:
        super().__init__(f"lost {', '.join(names)}")
        self.names = names
        self.cause = cause


class LearnerOutOfMemory(WorkerLost):
    """A rank had too little memory for a micro-batch; the others wait for it."""


@contextmanager
def watched(
    workers: Mapping[str, Any],
    *,
    hang_timeout_s: float,
    catch_up: Callable[[], object] = lambda: None,
    restarted: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Within, watch workers that are ready, by name.

    For one that Ray has started anew, restarted is told its name, and catch_up brings it to where the others are,
    again should it raise RayError; both on threads of their own. Raises WorkerLost for a fault that came from the loss
    of some of them.
    """
    places: list[_Place] = []
    try:
        places = ray.get([worker.pulse.remote() for worker in workers.values()], timeout=hang_timeout_s)
        watch = _Watch(
            workers,
            places=dict(zip(workers, places, strict=True)),
            hang_timeout_s=hang_timeout_s,
            catch_up=catch_up,
            restarted=restarted,
        )
        with watch.running():
            yield
    except RayError as fault:
        if isinstance(fault, GetTimeoutError):
            _dump(places)
        if names := lost(workers) or _UNNAMED.get(type(fault), []):
            raise WorkerLost(names, cause=fault) from fault
        raise


@contextmanager
def starting() -> Iterator[None]:
    """Within, workers start. Raises WorkerLost when one is gone that did not fail by itself, or takes too long."""
    try:
        yield
    except GetTimeoutError as fault:
        raise WorkerLost(["a worker at its start, for fault.start_timeout_s"], cause=fault) from fault
    except ActorDiedError as fault:
        if fault.actor_init_failed:
            raise
        raise WorkerLost(["a worker at its start"], cause=fault) from fault


def lost(workers: Mapping[str, Any]) -> list[str]:
    """Return the names of the workers that are dead or give no sign of life."""
    pulses = {worker.pulse.remote(): name for name, worker in workers.items()}
    answered, silent = ray.wait(list(pulses), num_returns=len(pulses), timeout=_ANSWER_S)
    return sorted([pulses[ref] for ref in silent] + [pulses[ref] for ref in answered if _is_dead(ref)])


class _Watch(threading.Thread):
    """Asks every worker for its pulse again and again, and kills one that owes it for too long.

    While Ray starts one anew, which is bounded by nothing but the size of its model, it may owe its pulse.
    """

    def __init__(
        self,
        workers: Mapping[str, Any],
        *,
        places: Mapping[str, _Place],
        hang_timeout_s: float,
        catch_up: Callable[[], object],
        restarted: Callable[[str], None],
    ) -> None:
        super().__init__(daemon=True, name="watch")
        self._workers = dict(workers)
        self._places = dict(places)
        self._limit_s = hang_timeout_s
        self._catch_up = catch_up
        self._restarted = restarted
        self._done = threading.Event()
        self._asked: dict[str, tuple[Any, float]] = {}  # by name: the reference and when
        self._starting: set[str] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self._done.set()
            self.join()
            self._look_back()

    def run(self) -> None:
        while not self._done.wait(min(self._limit_s / _LOOKS, _MAX_LOOK_S)):
            for name in list(self._workers):
                self._look_at(name)

    def _look_at(self, name: str) -> None:
        if name not in self._asked:
            self._asked[name] = (self._workers[name].pulse.remote(), time.monotonic())
            return
        ref, since = self._asked[name]
        if ray.wait([ref], timeout=0)[0]:
            del self._asked[name]
            self._take(name, ref)
        elif time.monotonic() - since > self._limit_s and name not in self._starting:
            self._starting.add(name)
            _signal_there(self._places[name], end=True)

    def _take(self, name: str, pulse: Any) -> None:
        try:
            place = ray.get(pulse)
        except ActorDiedError:
            del self._workers[name]
        except RayActorError:
            self._starting.add(name)
        else:
            self._starting.discard(name)
            if place != self._places[name]:
                self._told(name, place)
                # On a thread of its own: it waits for workers, which may hang, and are looked at here.
                threading.Thread(target=self._bring_back, daemon=True, name="catch up").start()

    def _told(self, name: str, place: _Place) -> None:
        self._restarted(name)
        self._places[name] = place

    def _bring_back(self) -> None:
        while not self._done.is_set():
            with suppress(RayError):
                self._catch_up()
                return
            self._done.wait(_MAX_LOOK_S)

    def _look_back(self) -> None:
        """Tell of those that were started anew since the last look."""
        pulses = {worker.pulse.remote(): name for name, worker in self._workers.items()}
        for ref in ray.wait(list(pulses), num_returns=len(pulses), timeout=_LAST_LOOK_S)[0] if pulses else ():
            with suppress(RayError):
                place = ray.get(ref)
                if place != self._places[pulses[ref]]:
                    self._told(pulses[ref], place)


def _is_dead(ref: Any) -> bool:
    try:
        ray.get(ref)
    except ActorDiedError:
        return True
    except RayActorError:  # Ray starts it anew
        return False
    return False


def _dump(places: Sequence[_Place]) -> None:
    """Have all workers write their stacks into their logs."""
    if places:
        ray.wait([_signal_there(place, end=False) for place in places], num_returns=len(places), timeout=_ANSWER_S)


def _signal_there(place: _Place, *, end: bool) -> Any:
    node, pid = place
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return _signal.options(scheduling_strategy=there).remote(pid, end=end)


@ray.remote(num_cpus=0)
def _signal(pid: int, *, end: bool) -> None:
    """Have a process write its stacks into its log if it still can, and end it. A stopped one ends as well."""
    with suppress(ProcessLookupError):
        os.kill(pid, DUMP_SIGNAL)
        time.sleep(_DUMP_S)
        if end:
            os.kill(pid, signal.SIGKILL)
