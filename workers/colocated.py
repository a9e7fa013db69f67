"""A learner that shares its GPU with the engines: they sleep while it updates."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from ray.exceptions import RayError

from opd_ray.comparison import Comparison
from opd_ray.protocol import Batch, Learner, Metrics, RolloutFleet, TeacherFleet, WeightBundle


class SleepingFleet(Protocol):
    """A pool of engines that can give their GPU's memory back."""

    def sleep(self) -> None:
        """Give it back; all that was asked of the pool must be answered. Harmless while it sleeps."""

    def wake(self) -> None:
        """Take it again. Raises RayError when an engine cannot, or is not what it was."""


class SleepingRollout(RolloutFleet, SleepingFleet, Protocol):
    """A `RolloutFleet` that serves nothing after waking until weights are loaded."""


class SharingLearner(Learner, Protocol):
    """A `Learner` that can give unused memory of the GPU back."""

    def release_memory(self) -> None:
        """Give back what is kept for later."""


class ColocatedLearner:
    """`Learner` that has its GPU to itself during an update.

    For loops that have nothing in flight then but the batch that is learned from, and that publish after every update.
    """

    def __init__(
        self,
        learner: SharingLearner,
        *,
        rollout: SleepingRollout,
        teacher: TeacherFleet,
        teachers: Sequence[SleepingFleet],
    ) -> None:
        """Take the run's fleets; teachers: those behind `teacher`."""
        self._learner, self._rollout, self._teacher, self._teachers = learner, rollout, teacher, teachers

    @property
    def version(self) -> int:
        """Return the version last published."""
        return self._learner.version

    def update(self, batch: Batch) -> Metrics:
        """Wait for the batch, put the engines to sleep, take an update, wake them.

        When the update fails, they are woken as far as that goes: the rollouts serve after the next publication.
        """
        self._rollout.summaries(batch.groups)
        self._teacher.summaries(batch.scores)
        start = time.perf_counter()
        for fleet in (self._rollout, *self._teachers):
            fleet.sleep()
        asleep = time.perf_counter()
        try:
            learned = self._learner.update(batch)
        except RayError:
            with suppress(RayError):  # the failed update is what has to be told
                self._wake()
            raise
        updated = time.perf_counter()
        self._wake()
        return {**learned, "time/sleep_s": asleep - start, "time/wake_s": time.perf_counter() - updated}

    def publish(self, version: int) -> WeightBundle:
        """Put the current weights into the object store under a version."""
        return self._learner.publish(version)

    def compare(self, batch: Batch) -> Comparison:
        """How the student stands to the teacher; the engines stay awake, a forward pass takes little."""
        return self._learner.compare(batch)

    def save(self, folder: str) -> None:
        """Write a checkpoint."""
        self._learner.save(folder)

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is written."""
        self._learner.wait_saved()

    def restore(self, folder: str) -> None:
        """Load a checkpoint."""
        self._learner.restore(folder)

    def export(self, folder: str) -> None:
        """Write the student."""
        self._learner.export(folder)

    def _wake(self) -> None:
        self._learner.release_memory()  # first: vLLM takes its memory from what the GPU has free
        for fleet in (self._rollout, *self._teachers):
            fleet.wake()
