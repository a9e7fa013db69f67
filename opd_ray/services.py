"""What the loop uses besides the fleets: where prompts come from, what is screened, measured, saved and recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd_ray.comparison import Comparison
from opd_ray.protocol import Batch, GroupSummary, Lasting, Metrics, Prompt, ScoreSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class BadGroup:
    """A group that its teacher could not score."""

    step: int  # the update it would have been for, as metrics.jsonl counts them; held out: the student's version
    held_out: bool
    teacher: str  # whose
    seed: int  # of the group's request
    reason: str
    summary: GroupSummary


class Quarantine(Protocol):
    """Keeps the groups that no teacher could score, for people to look at."""

    @property
    def where(self) -> str:
        """Return where they are."""

    def add(self, group: BadGroup) -> None:
        """Record a group."""

    def warn(self, message: str) -> None:
        """Tell what follows from bad groups."""


class Window(Lasting, Protocol):
    """Holds the groups in flight, not more than memory and staleness allow."""

    def fill(self, step: int) -> None:
        """Start as many groups as may be in flight while update `step` is waited for."""

    def take(self, step: int) -> tuple[Batch, Metrics]:
        """Return what update `step` learns from, finished or not."""

    def release(self) -> None:
        """Forget the groups taken last: they are learned from."""

    def retake(self, steps: range) -> None:
        """Give the places of these updates other prompts from now on."""


class Screen(Protocol):
    """Stands between the teachers and the learner."""

    def whole(self, batch: Batch) -> tuple[Batch, Metrics]:
        """Wait for a batch; return it with every bad group replaced, and what that took.

        Raises CannotGoOn when too many groups are bad, or a teacher is gone.
        """


class Tracker(Protocol):
    """Where a run's numbers go."""

    def passed(self, phase: str) -> None:
        """Note that the time since the last note went into a phase: wait, learn or publish."""

    def log(
        self,
        step: int,
        metrics: Metrics,
        summaries: Sequence[GroupSummary] = (),
        scored: Sequence[ScoreSummary] = (),
    ) -> None:
        """Record the metrics of an update, its samples, and who worked when."""

    def compare(self, step: int, by_task: Mapping[str, Comparison]) -> None:
        """Record how student and teacher stand to one another at an evaluation's samples."""

    def holds(self, step: int) -> bool:
        """Whether a step has been recorded, by this process or by the one that it resumes."""


class PromptSource(Protocol):
    """Training prompts; the batch of a step is a function of the step alone, so resuming needs no cursor."""

    def batch(self, step: int) -> Sequence[Prompt]:
        """Return the prompts of update `step`."""

    def replacement(self, step: int, *, position: int, attempt: int) -> Prompt:
        """Return another prompt of the same task for a position of that batch; attempts count from 1."""


class Evaluator(Protocol):
    """Measures the student on held-out prompts."""

    def evaluate(self, version: int) -> Metrics:
        """Return `eval/*` metrics of the student at a version."""


class Checkpoints(Protocol):
    """Owns the run's resumable states."""

    def save(self, step: int, *parts: Lasting) -> None:
        """Write the state after update `step`."""
