"""Owns a run's checkpoints: written beside their place, sealed by a manifest, renamed into it; checked when read."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.manifest import damage, seal, sync_folder
from opd_ray.protocol import CannotGoOn, Lasting, Learner, Metrics

_PREFIX = "step-"
_ASIDE = "damaged-"


@dataclass(slots=True, kw_only=True)
class DiskCheckpoints:
    """`Checkpoints` in the run dir. A folder `step-N` in it is whole, or has been damaged since."""

    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the run, for every manifest
    keep: int = 0  # the newest so many stay; 0: all
    max_failed_saves: int = 0  # in a row that a run goes on after
    saved: Callable[[int, Path], None] = lambda *_: None  # told of every checkpoint
    warn: Callable[[str, str], None] = lambda *_: None  # told of what befell one: words, and the kind of event
    wait_saved: Callable[[], None] | None = None  # asynchronous: waits for what the parts have left to be written
    _num_failed: int = 0  # in a row
    _num_failed_in_all: int = 0
    _pending: tuple[int, Future[None]] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))

    def save(self, step: int, *parts: Lasting) -> None:
        """Write the state after update `step`, or go on without. Raises CannotGoOn when too many failed in a row.

        Asynchronous: return once the parts are copied; the next call or `settle` tells whether that came to be whole.
        """
        self.settle()
        if self.wait_saved is None:
            self._counted(step, lambda: self.write(step, *parts))
        else:
            self._counted(step, lambda: self._start(step, *parts))

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if one is. Raises CannotGoOn as `save`."""
        if self._pending is not None:
            (step, written), self._pending = self._pending, None
            self._counted(step, written.result)
            if self.path(step).exists():
                self._keep(step)

    def forget(self) -> None:
        """Leave the checkpoint that is being written unfinished: who writes it is gone."""
        if self._pending is not None:
            (_, written), self._pending = self._pending, None
            wait([written])

    def write(self, step: int, *parts: Lasting) -> None:
        """Write the state after update `step`, then remove the oldest. Raises OSError and leaves what was there."""
        self._begin(step, *parts)
        self._finish(step)
        self._keep(step)

    def _start(self, step: int, *parts: Lasting) -> None:
        self._begin(step, *parts)
        self._pending = step, self._thread.submit(self._finish, step)

    def _begin(self, step: int, *parts: Lasting) -> None:
        partial = self._partial(step)
        with self._cleared(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for part in parts:
                part.save(str(partial))

    def _finish(self, step: int) -> None:
        partial = self._partial(step)
        with self._cleared(partial):
            if self.wait_saved is not None:
                self.wait_saved()
            seal(partial, {"step": step, **self.facts})
            self._put(partial, self.path(step))

    def _keep(self, step: int) -> None:
        for old in sorted(_steps(self.folder))[: -self.keep or None] if self.keep else ():
            shutil.rmtree(self.path(old), ignore_errors=True)
        self.saved(step, self.path(step))

    @contextmanager
    def _cleared(self, partial: Path) -> Iterator[None]:
        """Within, what is unfinished is removed when it stays so."""
        try:
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _counted(self, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as fault:
            self._num_failed += 1
            self._num_failed_in_all += 1
            words = f"the checkpoint of update {step} could not be written: {_words(fault)}"
            if self._num_failed > self.max_failed_saves:
                raise CannotGoOn(f"{words}; max_failed_saves={self.max_failed_saves} in a row are allowed") from None
            newest = max(_steps(self.folder), default=0)
            self.warn(f"{words}; the newest that there is: {newest or 'none'}", "checkpoint_failed")
        else:
            if self._pending is None:
                self._num_failed = 0

    def metrics(self) -> Metrics:
        """Return the count of checkpoints that could not be written."""
        return {"fault/failed_saves": float(self._num_failed_in_all)}

    def save_last(self, learner: Learner, *others: Lasting) -> str:
        """Write the state after the learner's last update, unless it is there; return what a person is told of it."""
        self.settle()
        step = learner.version
        if step == 0:
            return "no update was finished, resume=auto starts again"
        if step not in _steps(self.folder):
            self.write(step, learner, *others)
        return f"the checkpoint {self.path(step)} is written, resume=auto goes on from update {step}"

    def newest(self) -> int:
        """Return the step of the newest whole checkpoint, 0 where none was ever written.

        Damaged ones that are newer are set aside. Raises ValueError when there are only damaged ones.
        """
        for step in sorted(_steps(self.folder), reverse=True):
            path = self.path(step)
            fault = damage(path)
            if not fault:
                return step
            aside = self._set_aside(path)
            self.warn(f"{path}: {fault}; set aside as {aside.name}", "checkpoint_damaged")
        damaged = sorted(path.name for path in self.folder.glob(f"{_ASIDE}*"))
        if damaged:
            raise ValueError(
                f"{self.folder} holds damaged checkpoints only ({', '.join(damaged)}): put a whole one back, or"
                " resume=overwrite starts again"
            )
        return 0

    def roll_back(self, step: int) -> int:
        """Return the step to go another way from: the newest checkpoint up to update `step`, or else the oldest.

        Newer ones are removed. 0 where none was ever written.
        """
        self.forget()
        steps = _steps(self.folder)
        target = max((n for n in steps if n <= step), default=min(steps, default=0))
        for newer in [n for n in steps if n > target]:
            shutil.rmtree(self.path(newer))
        return self.newest()

    def restore(self, step: int, *parts: Lasting) -> None:
        """Load the state after update `step` into the parts; step 0 is the models as they were loaded."""
        for part in parts if step > 0 else ():
            part.restore(str(self.path(step)))

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / _name(step)

    def _partial(self, step: int) -> Path:
        return self.folder / f".{_name(step)}.partial"

    def _put(self, partial: Path, final: Path) -> None:
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _set_aside(self, path: Path) -> Path:
        names = (f"{_ASIDE}{path.name}{suffix}" for suffix in ("", *(f".{i}" for i in range(1, 1000))))
        aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        path.rename(aside)
        return aside


def _name(step: int) -> str:
    return f"{_PREFIX}{step:06d}"


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    return [int(name) for name in names if name.isdigit()]


def _words(fault: OSError) -> str:
    """Return the fault in a line: what a worker raised arrives with its traceback."""
    cause = getattr(fault, "cause", fault)
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
