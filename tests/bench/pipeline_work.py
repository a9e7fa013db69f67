"""The workload of part `pipeline`: response lengths, what each costs whom, and the times that follow without overhead.

Every response length is drawn from a log-normal distribution with its 99th percentile at 10 times the median, cut off
at 20 times. A rollout worker is an engine with NUM_SLOTS slots, a response holds one for its length times a cost; first
come, first served. A teacher worker scores one group after the other, the learner one batch, in proportion to tokens.
"""

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_ray.dispatch import Place

NUM_GROUPS, NUM_SAMPLES = 32, 4  # of a batch; a multiple of the teachers, who have every group in turn
NUM_ROLLOUTS, NUM_SLOTS, NUM_TEACHERS = 2, 8, 2
_MEDIAN_TOKENS, MAX_TOKENS = 64, 1280
_SIGMA = math.log(10) / 2.3263  # of log-normal lengths: the 99th percentile of a normal variable is 2.3263
_MEAN_TOKENS = 103.5  # of a response
_BATCH_S = 1.0  # of a pool that a case does not make faster

CASES: dict[
    str, tuple[float, float, float]
] = {  # rollouts, teachers, learner: how long a mean batch takes, of _BATCH_S
    "balanced": (1.0, 1.0, 1.0),
    "rollout_bound": (1.0, 0.5, 0.5),
    "teacher_bound": (0.5, 1.0, 0.5),
    "learner_bound": (0.5, 0.5, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds a token."""

    generate_s: float  # of one response, while others are generated beside it
    score_s: float
    learn_s: float

    @staticmethod
    def of(case: str) -> "Costs":
        """Return the costs with which each pool's mean batch takes what the case says."""
        generate, score, learn = (share * _BATCH_S / (NUM_GROUPS * NUM_SAMPLES * _MEAN_TOKENS) for share in CASES[case])
        return Costs(
            generate_s=generate * NUM_ROLLOUTS * NUM_SLOTS,
            score_s=score * NUM_TEACHERS,
            learn_s=learn,
        )


class Slots:
    """Servers of one queue, first come, first served: tells when what comes now will be finished.

    A server that has fallen behind the clock of the machine it sleeps on goes on from where its last work ended.
    """

    def __init__(self, num_slots: int) -> None:
        self._free_s = [0.0] * num_slots

    def take(self, seconds: float, *, now_s: float) -> float:
        """Return when work that arrives now ends; starts never lie before `now_s`."""
        end_s = max(now_s, heapq.heappop(self._free_s)) + seconds
        heapq.heappush(self._free_s, end_s)
        return end_s

    def take_now(self, seconds: float) -> float:
        """Return in how many seconds from now work that arrives now ends."""
        now_s = time.monotonic()
        return self.take(seconds, now_s=now_s) - now_s


def response_tokens(step: int, position: int) -> list[int]:
    """Return the lengths of the responses [G] of a group."""
    normal = np.random.default_rng((step, position)).standard_normal(NUM_SAMPLES)
    lengths: list[int] = (_MEDIAN_TOKENS * np.exp(_SIGMA * normal)).astype(int).clip(1, MAX_TOKENS).tolist()
    return lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A run of one case."""

    case: str
    num_steps: int

    def busiest_s(self) -> float:
        """Return a lower bound of the whole run, whatever is scheduled how: from the first request to the last update.

        The largest of three. A pool cannot take less than its total work shared evenly over its capacity (16 slots, 2
        teachers, 1 learner), plus what must come before its first work and after its last: the learner begins when the
        longest of the first batch, alone on the machine, is generated and scored; a teacher begins with the shortest
        group of all, and an update follows its last; after the last response there are the shortest score of all and an
        update.
        """
        costs, batches = Costs.of(self.case), self._batches()
        tokens = [[sum(group) for group in batch] for batch in batches]
        total = sum(map(sum, tokens))
        last_update_s = sum(tokens[-1]) * costs.learn_s
        first_batch_s = max(max(group) * costs.generate_s + sum(group) * costs.score_s for group in batches[0])
        first_group_s = min(max(group) for batch in batches for group in batch) * costs.generate_s
        shortest_score_s = min(map(min, tokens)) * costs.score_s
        return max(
            total * costs.generate_s / (NUM_ROLLOUTS * NUM_SLOTS) + shortest_score_s + last_update_s,
            first_group_s + total * costs.score_s / NUM_TEACHERS + last_update_s,
            first_batch_s + total * costs.learn_s,
        )

    def longest_phase_s(self, served: Sequence[Sequence[Place]]) -> float:
        """Return the longest of the three phases, summed over the batches after the first, which fills the pipeline.

        A batch has its pool to itself. Generating one ends with its longest response: slots that are free before that
        are part of the phase. served: as for `unhindered_s`.
        """
        costs, batches = Costs.of(self.case), self._batches()[1:]
        generate_s = 0.0
        for step in range(1, self.num_steps):
            flow = _Flow(costs)
            flow.ask([[place for place in of_worker if place.step == step] for of_worker in served], 0.0)
            generate_s += flow.generated_s()
        of_teachers = [
            max(sum(sum(batch[i]) for i in range(first, NUM_GROUPS, NUM_TEACHERS)) for first in range(NUM_TEACHERS))
            for batch in batches
        ]
        return max(
            generate_s,
            sum(of_teachers) * costs.score_s,
            sum(sum(map(sum, batch)) for batch in batches) * costs.learn_s,
        )

    def unhindered_s(self, served: Sequence[Sequence[Place]], *, max_staleness: int) -> float:
        """Return how long the run takes when messages, Ray and the controller take no time at all.

        served: of each rollout worker, the groups in the order in which they came, which Ray leaves open. A batch is
        asked for when the update before `max_staleness + 1` batches is over. Its groups take the slots of their worker
        in that order; each is scored by the teachers in turn from when its last response ends, or when that teacher is
        free; the update begins with the last score of the batch, or when the one before is over; publishing takes
        nothing.

        With max_staleness = 0 this is the sum of the steps' critical paths, and a lower bound: nothing can end sooner
        when all comes later, and a teacher's last score does not depend on the order in which it works.
        """
        costs, flow = Costs.of(self.case), _Flow(Costs.of(self.case))
        now_s, num_asked = 0.0, 0
        for step, batch in enumerate(self._batches()):
            while num_asked < min(step + 1 + max_staleness, self.num_steps):
                flow.ask([[place for place in of_worker if place.step == num_asked] for of_worker in served], now_s)
                num_asked += 1
            now_s = max(now_s, flow.scored_s(step)) + sum(map(sum, batch)) * costs.learn_s
        return now_s

    def _batches(self) -> list[list[list[int]]]:
        return [[response_tokens(step, i) for i in range(NUM_GROUPS)] for step in range(self.num_steps)]


class _Flow:
    """Rollouts and teachers on a clock of their own."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._rollouts = [Slots(NUM_SLOTS) for _ in range(NUM_ROLLOUTS)]
        self._teachers = [Slots(1) for _ in range(NUM_TEACHERS)]
        self._unscored: list[tuple[float, Place]] = []  # heap of groups by when they are generated
        self._last_score_s: dict[int, float] = {}  # by step

    def ask(self, batch: Sequence[Sequence[Place]], now_s: float) -> None:
        """Hand a batch to the rollout workers."""
        for worker, of_worker in zip(self._rollouts, batch, strict=True):
            for place in of_worker:
                seconds = [num_tokens * self._costs.generate_s for num_tokens in response_tokens(*place)]
                heapq.heappush(self._unscored, (max(worker.take(s, now_s=now_s) for s in seconds), place))

    def generated_s(self) -> float:
        """Return when the last group that was handed in is generated."""
        return max(end_s for end_s, _ in self._unscored)

    def scored_s(self, step: int) -> float:
        """Return when the last group of a batch is scored; groups of others that come before it have their turn."""
        while any(place.step == step for _, place in self._unscored):
            generated_s, place = heapq.heappop(self._unscored)
            teacher = self._teachers[place.position % NUM_TEACHERS]
            end_s = teacher.take(sum(response_tokens(*place)) * self._costs.score_s, now_s=generated_s)
            self._last_score_s[place.step] = max(end_s, self._last_score_s.get(place.step, 0.0))
        return self._last_score_s[step]
