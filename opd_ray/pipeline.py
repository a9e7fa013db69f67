"""Who works when: the arithmetic of a run's pools over its steps, from what each worker says it did.

A step's window runs from the end of the step before it to the end of its own publication, evaluation left out. Work for
later batches falls into it as well and is known only when those are learned from: windows are measured
`max_staleness` steps late, when all of it is.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Interval = tuple[float, float]  # Unix seconds

_BOUND, _IDLE, _BUSY = 0.75, 0.4, 0.85
_HINT_STEPS = 10  # windows that a hint is based on
_RUNNERS_UP = {"rollout": "generate", "teacher": "score", "learner": "learn"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What one worker did for a while."""

    lane: str  # the worker, such as rollout-0
    phase: str  # generate, score, learn, publish
    start: float
    end: float

    @property
    def pool(self) -> str:
        """Return the worker's pool; all teachers are one."""
        return self.lane.split("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One step as it passed: when, and what each worker did in it, without overlaps."""

    step: int
    start: float
    end: float
    spans: Sequence[Span]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as disjoint ones, ascending."""
    union: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def busy_s(spans: Iterable[Span], *, start: float, end: float) -> float:
    """Return how many seconds of a window one lane was at work."""
    return sum(b - a for a, b in merged((max(s.start, start), min(s.end, end)) for s in spans))


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Collects spans as they become known and closes windows when all work in them is."""

    num_workers: Mapping[str, int]  # by pool
    lag: int  # steps until all work in a window is known: max_staleness
    _spans: list[Span] = field(default_factory=list)
    _open: deque[tuple[int, float, float]] = field(default_factory=deque)
    _pools: set[str] = field(default_factory=set)  # that have shown any work so far

    def add(self, step: int, *, start: float, end: float, spans: Iterable[Span]) -> Window | None:
        """Take what a step has shown; return the window that is complete now, if one is."""
        new = list(spans)
        self._spans += new
        self._pools |= {span.pool for span in new}
        self._open.append((step, start, end))
        if len(self._open) <= self.lag:
            return None
        step, start, end = self._open.popleft()
        inside = [span for span in self._spans if span.end > start and span.start < end]
        self._spans = [span for span in self._spans if span.end > end]
        return Window(step=step, start=start, end=end, spans=_by_lane(inside, start=start, end=end))

    def metrics(self, window: Window) -> dict[str, float]:
        """Return each pool's utilisation, and its mean worker's seconds; of a pool that never told of work, neither."""
        length = window.end - window.start
        found = {}
        for pool, phase in _RUNNERS_UP.items():
            spans = [span for span in window.spans if span.pool == pool]
            if pool in self._pools and length > 0:
                total = sum(
                    busy_s((s for s in spans if s.lane == lane), start=window.start, end=window.end)
                    for lane in {span.lane for span in spans}
                )
                mean = total / max(self.num_workers.get(pool, 1), len({span.lane for span in spans}))
                found[f"perf/{pool}_utilisation"] = mean / length
                found |= {f"time/{phase}_s": mean} if pool != "learner" else {}
        return found


def _by_lane(spans: Sequence[Span], *, start: float, end: float) -> list[Span]:
    """Return the spans of each lane and phase, cut to a window and without overlaps."""
    kinds = sorted({(span.lane, span.phase) for span in spans})
    return [
        Span(lane=lane, phase=phase, start=a, end=b)
        for lane, phase in kinds
        for a, b in merged((max(s.start, start), min(s.end, end)) for s in spans if (s.lane, s.phase) == (lane, phase))
    ]


def utilisation(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the utilisation of each pool that metrics name."""
    named = {pool: metrics.get(f"perf/{pool}_utilisation") for pool in _RUNNERS_UP}
    return {pool: value for pool, value in named.items() if value is not None}


def bottleneck(metrics: Mapping[str, float]) -> str:
    """Return in words which pool the step waited for: it worked nearly all the time; none if no pool did."""
    used = utilisation(metrics)
    if len(used) < len(_RUNNERS_UP):
        return ""
    pool = max(used, key=lambda name: used[name])
    return f"{pool}-bound" if used[pool] >= _BOUND else "pools in turn"


class SplitWatch:
    """Sees pools that are badly split over a number of steps, and says so once."""

    def __init__(self, *, sizes: Mapping[str, int], gpus: bool, max_staleness: int, colocated: bool) -> None:
        """sizes: workers by pool. gpus: whether they have some. colocated: they share one, and take turns."""
        self._sizes, self._gpus, self._max_staleness = sizes, gpus, max_staleness
        self._seen: deque[dict[str, float]] = deque(maxlen=_HINT_STEPS)
        self._told = colocated

    def hint(self, metrics: Mapping[str, float]) -> str:
        """Take a step's utilisation; return what to change, or nothing."""
        used = utilisation(metrics)
        if self._told or len(used) < len(_RUNNERS_UP):
            return ""
        self._seen.append(used)
        if len(self._seen) < _HINT_STEPS:
            return ""
        mean = {pool: sum(seen[pool] for seen in self._seen) / _HINT_STEPS for pool in _RUNNERS_UP}
        idle, busy = min(mean, key=lambda p: mean[p]), max(mean, key=lambda p: mean[p])
        words = ""
        if mean[busy] >= _BUSY and mean[idle] <= _IDLE:
            shares = f"{idle} is idle {1 - mean[idle]:.0%} of the time, {busy} {1 - mean[busy]:.0%}"
            words = f"{shares}: {self._advice(idle, busy)}"
        elif mean[busy] < _BOUND and self._max_staleness == 0:
            words = f"every pool is idle {1 - mean[busy]:.0%} of the time or more: max_staleness=1 lets them overlap"
        self._told = bool(words)
        return words

    def _advice(self, idle: str, busy: str) -> str:
        unit = "GPU" if self._gpus else "worker"
        if self._sizes.get(idle, 1) > 1:
            return (
                f"move one {unit} to {busy} ({_key(idle)}={self._sizes[idle] - 1} {_key(busy)}="
                f"{self._sizes.get(busy, 1) + 1})"
            )
        return f"raise {_key(busy)} above {self._sizes.get(busy, 1)}"


def _key(pool: str) -> str:
    return "learner.num_ranks" if pool == "learner" else f"{pool}.num_workers"
