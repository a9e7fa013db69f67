"""What is kept of a sweep's trials, and what is told of them."""

import csv
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from config_files import CONFIG_DIR, compose_raw
from omegaconf import OmegaConf
from rich.console import Console

from opd_ray.sweep import (
    Outcome,
    SweepSummary,
    Trial,
    as_trial,
    record_trial,
    sweep_table,
    sweep_value,
    trial_of,
)


def trial(number: int, *, lr: str = "0.1", **fields: object) -> Trial:
    given = {"status": "finished", "metric": "reverse_kl_after", "value": 0.5, "summary": {"reverse_kl_after": 0.5}}
    return Trial(
        number=number, name=f"run-{number}", overrides=["experiment=demo", f"learner.lr={lr}"], **(given | fields)
    )


def test_every_trial_has_a_row_by_number_with_its_overrides_and_figures(tmp_path: Path) -> None:
    record_trial(tmp_path / "sweep", trial(1, lr="0.2", summary={"steps": 2, "wall_s": 1.5}))
    record_trial(tmp_path / "sweep", trial(0, status="failed", value=None, summary={}, error='a "worker", died'))
    with (tmp_path / "sweep" / "sweep_summary.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["trial"], first["run"], first["status"], first["steps"]) == ("0", "run-0", "failed", "")
    assert first["error"] == 'a "worker", died'
    assert (second["learner.lr"], second["wall_s"], second["experiment"]) == ("0.2", "1.5", "demo")


def test_the_table_shows_what_tells_trials_apart() -> None:
    screen = Console(file=io.StringIO(), width=120)
    screen.print(sweep_table([trial(0), trial(1, lr="0.2", value=None, status="failed", error="lr too high\nmore")]))
    text = screen.file.getvalue()
    assert "learner.lr" in text
    assert "experiment" not in text
    assert "failed: lr too high" in text
    assert "more" not in text


def test_a_sweep_starts_without_the_trials_of_the_one_before_and_fails_with_any_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    record_trial(tmp_path, trial(0, status="failed", error="away"))
    with pytest.raises(SystemExit) as caught:
        SweepSummary().on_multirun_end(composed)
    assert caught.value.code == 1
    SweepSummary().on_multirun_start(composed)
    record_trial(tmp_path, trial(0))
    capsys.readouterr()
    SweepSummary().on_multirun_end(composed)
    assert "away" not in capsys.readouterr().out


def test_a_run_of_a_wandb_agent_has_a_name_of_its_own_and_the_sweeps_group(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = compose_raw("experiment=demo")
    assert as_trial(composed).name == "demo"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    named = as_trial(composed)
    assert (named.name, named.tracking.group) == ("demo-r1", "sw33p")
    assert composed.name == "demo"


def test_a_metric_that_the_run_does_not_have_is_told_with_those_it_has() -> None:
    composed = compose_raw("experiment=demo", "eval.sweep_metric=accuracy")
    outcome = Outcome(summary={"steps": 2.0, "wall_s": 1.0})
    kept = trial_of(outcome, composed, number=0, overrides=[])
    assert kept.status == "finished"
    assert kept.error == "eval.sweep_metric=accuracy: the run has no such figure, it has steps, wall_s"
    assert math.isnan(sweep_value("accuracy", outcome.summary))
    assert sweep_value("steps", outcome.summary) == 2.0


def test_trials_that_cannot_be_run_are_rows_of_the_table_and_end_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opd_ray.train", "--multirun", "experiment=demo", f"runs_dir={tmp_path}"]
    done = subprocess.run(
        [*command, "name=sweep", "learner.lr=-1,-2", "tracking=none"],
        cwd=CONFIG_DIR.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: trial {i}: learner.lr={lr}: expected a number above 0" for i, lr in enumerate((-1.0, -2.0))
    ]
    with (tmp_path / "sweeps" / "sweep" / "sweep_summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["status"], row["learner.lr"]) for row in rows] == [
        ("sweep-0", "failed", "-1"),
        ("sweep-1", "failed", "-2"),
    ]
    assert "sweep_summary.csv" in done.stdout
    assert list(tmp_path.glob("sweep-*")) == []
