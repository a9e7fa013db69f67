"""Records what a run trains on: hands references to one actor that writes them, and never waits long for a disk."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from opd_ray.comparison import Comparison
from opd_ray.protocol import Batch, Learner, Metrics, WeightBundle
from opd_ray.scores.files import write_update
from opd_ray.scores.messages import Scored

_MAX_UPDATES_BEHIND = 2  # updates that wait for the disk; their arrays stay in the object store until then
_MAX_WAIT_S = 600.0  # for one update's files
_PARTS = 4  # references a group


class Recorder:
    """Writes updates in order. After the first fault it writes nothing more, so that no update is missing between."""

    def __init__(self, *, folder: Path) -> None:
        self._folder = folder
        self._fault = ""

    def write(self, step: int, teachers: Sequence[str], *parts: Any) -> str:
        """Write an update; parts are group summary, group, score summary and score of each group. Return what went
        wrong, or nothing."""
        if not self._fault:
            try:
                write_update(self._folder, step=step, scored=_scored(teachers, parts))
            except OSError as error:
                self._fault = f"update {step}: {error.filename or self._folder}: {error.strerror}"
        return self._fault


class RecordingLearner:
    """`Learner` whose every batch is recorded. A fault ends the recording and is told once; training goes on."""

    def __init__(self, learner: Learner, *, recorder: Any, on_fault: Callable[[str], None]) -> None:
        self._learner = learner
        self._recorder = recorder
        self._on_fault = on_fault
        self._pending = deque[Any]()
        self._stopped = False

    @property
    def version(self) -> int:
        """Return the version last published."""
        return self._learner.version

    def update(self, batch: Batch) -> Metrics:
        """Have the batch written, and take the update meanwhile; waits only when the disk is updates behind."""
        if not self._stopped:
            pairs = zip(batch.groups, batch.scores, strict=True)
            parts = [ref for g, s in pairs for ref in (g.summary, g.group, s.summary, s.score)]
            teachers = [score.teacher for score in batch.scores]
            self._pending.append(self._recorder.write.remote(batch.step, teachers, *parts))
            self._settle(_MAX_UPDATES_BEHIND)
        return self._learner.update(batch)

    def publish(self, version: int) -> WeightBundle:
        """Put the current weights into the object store under a version."""
        return self._learner.publish(version)

    def compare(self, batch: Batch) -> Comparison:
        """How the student stands to the teacher; evaluation is not recorded."""
        return self._learner.compare(batch)

    def save(self, folder: str) -> None:
        """Write a checkpoint, after the files of the updates it holds."""
        self.finish()
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

    def finish(self) -> None:
        """Wait for the last update's files."""
        self._settle(0)

    def _settle(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            try:
                fault = ray.get(self._pending.popleft(), timeout=_MAX_WAIT_S)
            except RayError as error:  # the recorder died, or the disk hangs
                fault = str(error).strip().splitlines()[-1]
            if fault:
                self._stopped = True
                self._pending.clear()
                self._on_fault(fault)


def _scored(teachers: Sequence[str], parts: Sequence[Any]) -> list[Scored]:
    rows = [parts[i : i + _PARTS] for i in range(0, len(parts), _PARTS)]
    return [
        Scored(teacher=teacher, group_summary=row[0], group=row[1], score_summary=row[2], score=row[3])
        for teacher, row in zip(teachers, rows, strict=True)
    ]
