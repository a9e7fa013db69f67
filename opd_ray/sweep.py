"""Trials of a sweep: how each is named, what is kept of it, and the table and CSV at the end."""

import csv
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

SUMMARY_FILE = "sweep_summary.csv"
_TRIALS_FILE = "trials.jsonl"
_FAILED = 1  # exit code


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    summary: Mapping[str, float] = field(default_factory=dict)  # of a run that ended well
    error: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of one run of a sweep."""

    number: int
    name: str
    overrides: Sequence[str]
    status: str  # finished or failed
    metric: str  # eval.sweep_metric
    value: float | None = None  # of that metric; None: there is none
    summary: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def as_trial(composed: DictConfig) -> DictConfig:
    """Return the configuration, that of a trial with a name of its own and the sweep's W&B group.

    `--multirun` numbers its trials, an agent of a W&B sweep names them by id.
    """
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        return _named(composed, suffix=os.environ["WANDB_RUN_ID"], group=os.environ["WANDB_SWEEP_ID"])
    number = trial_number()
    return composed if number is None else _named(composed, suffix=str(number), group=str(composed.name))


def trial_number() -> int | None:
    """Return which trial of a `--multirun` this is; None outside one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    return int(HydraConfig.get().job.num)


def trial_name(name: str, number: int) -> str:
    """Return the name of a trial's run."""
    return f"{name}-{number}"


def trial_of(outcome: Outcome, composed: DictConfig, *, number: int, overrides: Sequence[str]) -> Trial:
    """Return what is kept of a trial."""
    metric = str(composed.eval.sweep_metric)
    error = outcome.error
    if not error and metric not in outcome.summary:
        error = f"eval.sweep_metric={metric}: the run has no such figure, it has {', '.join(outcome.summary)}"
    return Trial(
        number=number,
        name=str(composed.name),
        overrides=list(overrides),
        status="failed" if outcome.error else "finished",
        metric=metric,
        value=outcome.summary.get(metric),
        summary=dict(outcome.summary),
        error=error,
    )


def sweep_value(metric: str, summary: Mapping[str, float]) -> float:
    """Return what a sweeper is told: a figure of the run's summary, NaN where it was not measured."""
    return summary.get(metric, math.nan)


def record_trial(folder: Path, trial: Trial) -> None:
    """Add a trial to the sweep's folder and write the CSV of all so far."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _TRIALS_FILE).open("a") as file:
        file.write(json.dumps(asdict(trial)) + "\n")
    _write_csv(folder / SUMMARY_FILE, read_trials(folder))


def read_trials(folder: Path) -> list[Trial]:
    """Return the trials of a sweep by number."""
    path = folder / _TRIALS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Trial(**json.loads(line)) for line in lines), key=lambda trial: trial.number)


class SweepSummary(Callback):
    """Hydra's callback around a `--multirun`: forgets the trials of an earlier one, prints the table of this one."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Start without trials."""
        for name in (_TRIALS_FILE, SUMMARY_FILE):
            (Path(config.hydra.sweep.dir) / name).unlink(missing_ok=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the trials; exit code 1 when one has failed."""
        folder = Path(config.hydra.sweep.dir)
        trials = read_trials(folder)
        if not trials:
            return
        console = Console(highlight=False)
        console.print(sweep_table(trials))
        console.print(f"{folder / SUMMARY_FILE}: these and all other figures", soft_wrap=True, markup=False)
        if any(trial.status == "failed" for trial in trials):
            sys.exit(_FAILED)


def sweep_table(trials: Sequence[Trial]) -> Table:
    """Return trials with what told them apart and the metric that the sweep is after."""
    keys = _varied(trials)
    table = Table(title="Sweep", title_justify="left")
    for heading in ("trial", "run", *keys, trials[0].metric, "status"):
        table.add_column(heading, overflow="fold")
    for trial in trials:
        values = dict(map(_split, trial.overrides))
        shown = "-" if trial.value is None else f"{trial.value:.5g}"
        status = f"{trial.status}: {trial.error.splitlines()[0]}" if trial.error else trial.status
        table.add_row(str(trial.number), trial.name, *(values.get(key, "") for key in keys), shown, status)
    return table


def _named(composed: DictConfig, *, suffix: str, group: str) -> DictConfig:
    composed = deepcopy(composed)
    composed.name = f"{composed.name}-{suffix}"
    composed.tracking.group = composed.tracking.group or group
    return composed


def _write_csv(path: Path, trials: Sequence[Trial]) -> None:
    keys = list(dict.fromkeys(key for trial in trials for key, _ in map(_split, trial.overrides)))
    figures = list(dict.fromkeys(name for trial in trials for name in trial.summary))
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "run", "status", *keys, *figures, "error"])
        for trial in trials:
            values = dict(map(_split, trial.overrides))
            row = [trial.number, trial.name, trial.status, *(values.get(key, "") for key in keys)]
            writer.writerow([*row, *(trial.summary.get(name, "") for name in figures), trial.error])
    partial.replace(path)


def _varied(trials: Sequence[Trial]) -> list[str]:
    """Return the keys of the overrides that are not the same in all trials."""
    by_key: dict[str, set[str]] = {}
    for trial in trials:
        for key, value in map(_split, trial.overrides):
            by_key.setdefault(key, set()).add(value)
    return [key for key, values in by_key.items() if len(values) > 1]


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value
