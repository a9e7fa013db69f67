"""Owns a run's place on disk: what lies where, and the claim on it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from opd_ray.config.schema import Config, ResumePolicy


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


def claim(run_dir: RunDir, policy: ResumePolicy) -> None:
    """Make the run dir ready: there, and empty for resume=overwrite."""
    if policy is ResumePolicy.overwrite and run_dir.holds_run():
        shutil.rmtree(run_dir.path)
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{run_dir.path} cannot be made ({error.strerror}): choose another runs_dir=...") from None
    if not os.access(run_dir.path, os.W_OK):
        raise ValueError(f"{run_dir.path} cannot be written: choose another runs_dir=...")
