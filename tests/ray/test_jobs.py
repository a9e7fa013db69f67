"""Runs as jobs of a real cluster with token authentication: submitted, followed, stopped, taken up again, swept."""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from head_node import HeadNode, head_node
from helpers import read_lines

pytestmark = pytest.mark.ray

Overrides = Callable[..., list[str]]
_DEADLINE_S = 240


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadNode]:
    """Return a head node that the module's tests share."""
    with head_node(tmp_path_factory.mktemp("h"), num_cpus=8) as node:
        yield node


def submit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "opd_ray.submit", *arguments]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _DEADLINE_S
    while not holds():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the cluster refuses the token that was sent; expected RAY_AUTH_MODE=token and"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, "the cluster asks for a token; expected RAY_AUTH_MODE"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "no Ray dashboard answers there"),
        ({"RAY_API_SERVER_ADDRESS": "127.0.0.1:6379"}, "expected the dashboard's address, such as http://head:8265"),
    ],
    ids=["wrong token", "no token", "no cluster", "another port"],
)
def test_a_cluster_that_cannot_be_used_is_explained_in_one_line(
    head: HeadNode, overrides: Overrides, env: dict[str, str], words: str
) -> None:
    done = head.run(*submit(*overrides()), **env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: address=")
    assert words in line
    assert done.stdout == ""


@pytest.mark.slow
def test_a_job_of_rays_own_command_line_trains_and_is_followed(head: HeadNode, tmp_path: Path) -> None:
    quick = ["student.build.num_steps=2", "teacher.build.num_steps=2"]
    paths = [f"student.path={tmp_path}/student", f"teacher.path={tmp_path}/teacher", f"runs_dir={tmp_path}/runs"]
    small = ["num_steps=2", "eval_every=0", "save_every=0", "batch.num_prompts=8", "eval.num_prompts=8"]
    command = ["python", "-m", "opd_ray.train", "experiment=demo", "tracking=none", *quick, *paths, *small]
    done = head.run("ray", "job", "submit", "--submission-id=by-hand", "--working-dir=.", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train 2/2" in done.stdout
    assert "held-out reverse KL after" in done.stdout
    assert "SUCCEEDED" in head.run("ray", "job", "status", "by-hand").stdout.upper()
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["steps"] == 2
    uploaded = list(head.sessions.glob("session_*/runtime_resources/working_dir_files/*"))
    assert uploaded
    files = {p.name for folder in uploaded if folder.is_dir() for p in folder.iterdir()}
    assert "opd_ray" in files
    assert not files & {".git", ".venv", "runs"}


@pytest.mark.slow
def test_a_stopped_job_saves_itself_and_the_same_command_goes_on_from_there(
    head: HeadNode, overrides: Overrides, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "runs" / "test", tmp_path / "first.log"
    command = submit(*overrides("num_steps=2000", "max_staleness=1"))
    first = head.start(*command, log=log)
    wait_until(lambda: len(read_lines(run_dir / "metrics.jsonl")) > 3)
    again = head.run(*command)
    assert again.returncode == 2
    assert "test: a job of this name is running already; stop it with `ray job stop test`" in again.stderr
    assert head.run("ray", "job", "stop", "test").returncode == 0
    assert first.wait(timeout=60) == 1
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    step = json.loads((checkpoint / "MANIFEST.json").read_text())["step"]
    assert f"error: stopped by SIGTERM; the checkpoint {checkpoint} is written" in log.read_text()
    assert read_lines(run_dir / "metrics.jsonl")[-1]["step"] == step

    done = head.run(*submit(*overrides(f"num_steps={step + 2}", "max_staleness=1")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"steps      {step} to {step + 2} (resumed)" in done.stdout
    assert "stopped by SIGTERM" not in done.stdout  # what the first job printed
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == list(range(step + 3))


@pytest.mark.slow
def test_an_optuna_sweep_over_ray_jobs_is_told_each_trials_figure_and_leaves_a_table(
    head: HeadNode, overrides: Overrides, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "opd_ray.train", "--multirun", "hydra/launcher=ray_jobs"]
    optuna = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.direction=minimize",
    ]
    tolerant = ["hydra.sweeper.max_failure_rate=0.5", "hydra.launcher.max_concurrent=2"]
    fixed = [override for override in overrides() if not override.startswith("learner.lr=")]
    done = head.run(*command, *optuna, *tolerant, *fixed, "learner.lr=tag(log,interval(0.0001,0.1))")
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "runs" / "sweeps" / "test"
    with (sweep / "sweep_summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["test-0", "test-1"]
    assert {row["status"] for row in rows} == {"finished"}
    figures = [float(row["reverse_kl_after"]) for row in rows]
    of_runs = [json.loads((tmp_path / "runs" / row["run"] / "summary.json").read_text()) for row in rows]
    assert figures == [summary["reverse_kl_after"] for summary in of_runs]
    assert len({row["learner.lr"] for row in rows}) == 2
    best = (sweep / "optimization_results.yaml").read_text()
    assert f"best_value: {min(figures)}" in best
    assert "test-1" in done.stdout
