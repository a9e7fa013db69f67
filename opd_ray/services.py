"""What the loop uses besides the fleets: where prompts come from, what is measured, saved and recorded."""

from collections.abc import Sequence
from typing import Protocol

from opd_ray.protocol import GroupSummary, Metrics, Prompt


class Tracker(Protocol):
    """Where a run's numbers go."""

    def log(self, step: int, metrics: Metrics, summaries: Sequence[GroupSummary] = ()) -> None:
        """Record the metrics of an update, and its samples."""
        ...


class PromptSource(Protocol):
    """Training prompts; the batch of a step is a function of the step alone, so resuming needs no cursor."""

    def batch(self, step: int) -> Sequence[Prompt]:
        """Return the prompts of update `step`."""
        ...


class Evaluator(Protocol):
    """Measures the student on held-out prompts."""

    def evaluate(self, version: int) -> Metrics:
        """Return `eval/*` metrics of the student at a version."""
        ...


class Lasting(Protocol):
    """What has a state that outlives the run."""

    def save(self, folder: str) -> None:
        """Write it into a checkpoint's folder."""
        ...

    def restore(self, folder: str) -> None:
        """Load what `save` has written."""
        ...


class Checkpoints(Protocol):
    """Owns the run's resumable states."""

    def save(self, step: int, *parts: Lasting) -> None:
        """Write the state after update `step`."""
        ...
