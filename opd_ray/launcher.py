"""Hydra's launcher `hydra/launcher=ray_jobs`: every trial of a `--multirun` is a job of a Ray cluster."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.core.utils import JobStatus as HydraStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.live import Live
from rich.table import Table

from opd_ray.jobs import TELL_RESULT, Job, Jobs, lasting_runs_dir, result_in
from opd_ray.sweep import Outcome, record_trial, sweep_value, trial_name, trial_of

_PLUGIN = "hydra_plugins.ray_jobs"
_POLL_S = 2.0
_GRACE_S = 600
_PATIENCE_S = 10_000_000  # a trial waits for its place for as long as others hold it
_USER_ERROR, _INTERRUPTED = 2, 130  # exit codes
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass
class RayJobsConf:
    """Options of the launcher, `hydra.launcher.*`."""

    _target_: str = f"{_PLUGIN}.RayJobsLauncher"
    address: str | None = None  # the dashboard, http://host:8265; null: RAY_API_SERVER_ADDRESS
    max_concurrent: int = 4  # trials at once; those that find no room wait in the cluster


@dataclass(slots=True, kw_only=True)
class _Running:
    """One trial and how far it is."""

    number: int
    job: Job
    config: DictConfig
    overrides: Sequence[str]
    state: str = "waiting"
    first_line: str = ""  # of what its job prints
    start: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    outcome: Outcome | None = None


class RayJobsLauncher(Launcher):
    """Submits trials, at most so many at once, waits for them and tells the sweeper what came of each."""

    def __init__(self, address: str | None, max_concurrent: int) -> None:
        self._address, self._max_concurrent = address, max_concurrent

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:  # noqa: ARG002 - Hydra's names
        """Take what Hydra gives to a launcher; the task itself runs in the jobs."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of trials to its end; what a user can mend ends the sweep with one line and exit code 2."""
        try:
            if self._max_concurrent < 1:
                given = f"hydra.launcher.max_concurrent={self._max_concurrent}"
                raise ValueError(f"{given}: expected an integer of at least 1")
            self._jobs = Jobs(self._address)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(_USER_ERROR)
        trials = [self._trial(initial_job_idx + i, list(o)) for i, o in enumerate(job_overrides)]
        try:
            self._wait_for(trials)
        except (ValueError, KeyboardInterrupt) as fault:  # the cluster is away, or the one who waits is
            print(f"error: {str(fault) or 'interrupted'}; the trials that are submitted go on", file=sys.stderr)
            sys.exit(_USER_ERROR if str(fault) else _INTERRUPTED)
        return [self._returned(trial) for trial in trials]

    def _wait_for(self, trials: Sequence[_Running]) -> None:
        """Start trials as others end, and show how far they are, until all have ended."""
        console = Console(highlight=False)
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while any(trial.outcome is None for trial in trials):
                changed = self._advance(trials)
                if console.is_terminal:
                    live.update(_table(trials), refresh=True)
                elif changed:
                    console.print("\n".join(changed), markup=False, soft_wrap=True)
                if any(trial.outcome is None for trial in trials):
                    time.sleep(_POLL_S)

    def _trial(self, number: int, overrides: list[str]) -> _Running:
        """Return a trial that is not started yet, with the configuration that its job will have."""
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.num = number
        own = [override for override in overrides if not override.startswith("name=")]
        base = str(config.name)
        config.name = trial_name(base, number)
        added = [f"name={config.name}", *lasting_runs_dir(config.runs_dir)]
        added += [] if config.tracking.group else [f"tracking.group={base}"]
        added += [f"cluster.placement_timeout_s={_PATIENCE_S}"]
        job = Job(name=config.name, overrides=[*own, *added], grace_s=_GRACE_S, env={TELL_RESULT: "1"})
        return _Running(number=number, job=job, config=config, overrides=overrides)

    def _advance(self, trials: Sequence[_Running]) -> list[str]:
        """Look at what runs and start what may; return a line for each trial that changed."""
        before = [trial.state for trial in trials]
        for trial in trials:
            if trial.outcome is None and trial.state != "waiting":
                self._look(trial)
        running = sum(trial.outcome is None and trial.state != "waiting" for trial in trials)
        for trial in [t for t in trials if t.state == "waiting"][: self._max_concurrent - running]:
            self._start(trial)
        return [f"{t.job.name}: {t.state}" for t, state in zip(trials, before, strict=True) if t.state != state]

    def _start(self, trial: _Running) -> None:
        trial.start, trial.state = time.monotonic(), "submitted"
        try:
            trial.first_line = self._jobs.start(trial.job)
        except ValueError as fault:
            trial.state = "refused"
            self._end(trial, Outcome(error=str(fault), exit_code=_USER_ERROR))

    def _look(self, trial: _Running) -> None:
        status = self._jobs.status(trial.job.name)
        name = status.value if status else "STOPPED"
        trial.state, trial.seconds = name.lower(), time.monotonic() - trial.start
        if name not in _ENDED:
            return
        logs = self._jobs.output(trial.job.name, first_line=trial.first_line)
        if name == "SUCCEEDED":
            self._end(trial, Outcome(summary=result_in(logs)))
        else:
            errors = [line for line in logs.splitlines() if line.startswith("error: ")]
            words = errors[-1].removeprefix("error: ") if errors else self._jobs.message(trial.job.name)
            self._end(trial, Outcome(error=words or name.lower(), exit_code=1))

    def _end(self, trial: _Running, outcome: Outcome) -> None:
        """Note what came of a trial, for the sweeper and in the sweep's folder."""
        trial.outcome = outcome
        record_trial(
            Path(self._config.hydra.sweep.dir),
            trial_of(outcome, trial.config, number=trial.number, overrides=trial.overrides),
        )

    def _returned(self, trial: _Running) -> JobReturn:
        assert trial.outcome is not None
        returned = JobReturn(overrides=trial.overrides, cfg=trial.config, task_name="train")
        returned.status = HydraStatus.COMPLETED  # a failed trial is told as NaN: the others go on
        returned.return_value = sweep_value(trial.config.eval.sweep_metric, trial.outcome.summary)
        return returned


def register_launcher() -> None:
    """Make the launcher known to Hydra, which takes plugins by name, from the package hydra_plugins only."""
    try:
        package = import_module("hydra_plugins")
    except ModuleNotFoundError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    package.ray_jobs = sys.modules[_PLUGIN] = sys.modules[__name__]  # type: ignore[attr-defined]
    RayJobsLauncher.__module__ = _PLUGIN
    Plugins.instance().register(RayJobsLauncher)
    ConfigStore.instance().store(group="hydra/launcher", name="ray_jobs", node=RayJobsConf)


def _table(trials: Sequence[_Running]) -> Table:
    table = Table()
    for heading in ("trial", "job", "overrides", "state", "seconds"):
        table.add_column(heading, overflow="fold")
    for trial in trials:
        row = (str(trial.number), trial.job.name, " ".join(trial.overrides), trial.state, f"{trial.seconds:.0f}")
        table.add_row(*row)
    return table
