"""Owns what a run leaves on disk: the claim on its run dir, and its checkpoints, whole or not at all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd_ray.config.schema import Config, ResumePolicy
from opd_ray.protocol import Lasting, Learner

_STATE_FILE = "state.json"  # written last inside a checkpoint: without it the folder is no checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDir:
    """Where things lie in `runs/<name>/`."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> "RunDir":
        """Return the run's folder, absolute."""
        return cls(path=(Path(config.runs_dir) / config.name).resolve())

    @property
    def checkpoints(self) -> Path:
        """Return the folder of resumable states."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Return the folder of the final student."""
        return self.path / "export"

    @property
    def logs(self) -> Path:
        """Return the folder of the workers' own output."""
        return self.path / "logs"

    @property
    def quarantine(self) -> Path:
        """Return the file of the groups that no teacher could score."""
        return self.path / "quarantine.jsonl"

    @property
    def scores(self) -> Path:
        """Return the folder of recorded scores."""
        return self.path / "scores"

    def holds_run(self) -> bool:
        """Whether a run has been here."""
        return (self.path / "config.yaml").exists()


def check_free(run_dir: RunDir, policy: ResumePolicy) -> None:
    """Raise ValueError when the run dir holds another run and nothing says what to do with it."""
    if run_dir.path.exists() and not run_dir.path.is_dir():
        raise ValueError(f"{run_dir.path} is a file: choose another name=... or runs_dir=...")
    if run_dir.holds_run() and policy is ResumePolicy.never:
        raise ValueError(
            f"{run_dir.path} holds another run: resume=auto continues it, resume=overwrite deletes it, name=... starts"
            " a new one beside it"
        )


def claim(run_dir: RunDir, policy: ResumePolicy) -> int:
    """Make the run dir ready and return the step to start from: 0, or that of the newest checkpoint to resume."""
    if policy is ResumePolicy.overwrite and run_dir.holds_run():
        shutil.rmtree(run_dir.path)
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{run_dir.path} cannot be made ({error.strerror}): choose another runs_dir=...") from None
    return max(_steps(run_dir.checkpoints), default=0) if policy is ResumePolicy.auto else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCheckpoints:
    """`Checkpoints` in the run dir: written beside their place, then renamed into it."""

    folder: Path
    saved: Callable[[int, Path], None] = lambda *_: None  # told of every checkpoint

    def save(self, step: int, *parts: Lasting) -> None:
        """Write the state after update `step`."""
        final = self.folder / _name(step)
        partial = self.folder / f".{_name(step)}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for part in parts:
            part.save(str(partial))
        (partial / _STATE_FILE).write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self.saved(step, final)

    def save_last(self, learner: Learner, *others: Lasting) -> str:
        """Write the state after the learner's last update, unless it is there; return what a person is told of it."""
        step = learner.version
        if step == 0:
            return "no update was finished, resume=auto starts again"
        if step not in _steps(self.folder):
            self.save(step, learner, *others)
        return f"the checkpoint {self.folder / _name(step)} is written, resume=auto goes on from update {step}"

    def restore(self, step: int, *parts: Lasting) -> None:
        """Load the state after update `step` into the parts; step 0 is the models as they were loaded."""
        for part in parts if step > 0 else ():
            part.restore(str(self.folder / _name(step)))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _steps(folder: Path) -> list[int]:
    return [json.loads(file.read_text())["step"] for file in folder.glob(f"step-*/{_STATE_FILE}")]
