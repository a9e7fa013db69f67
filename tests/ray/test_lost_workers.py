"""A worker dies or hangs in a run: the same job ends with the weights of a run that nothing befell."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from head_node import PROJECT
from safetensors.torch import load_file

pytestmark = pytest.mark.ray

_WAIT_S = 240


def _run(arguments: list[str], *, harm: Callable[[subprocess.Popen[str]], None] = lambda _: None) -> str:
    """Run a command line to its end, which is to be a good one; return what it printed."""
    command = [sys.executable, "-m", "opd_ray.train", *arguments]
    run = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        harm(run)
        output, _ = run.communicate(timeout=_WAIT_S)
    finally:
        run.kill()
    assert run.returncode == 0, output
    return output


def _worker(run: subprocess.Popen[str], name: str) -> psutil.Process:
    """Return the process of a worker of a run, by the log that it writes to."""
    for process in psutil.Process(run.pid).children(recursive=True):
        if "ray::" in " ".join(process.cmdline()) and any(
            f.path.endswith(f"/{name}.log") for f in process.open_files()
        ):
            return process
    raise AssertionError(f"no {name}")


def _wait_for_step(path: Path, step: int, run: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _WAIT_S
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, torch.Tensor]]:
    """Hold the weights that a run ends with when nothing befalls it, once they are known."""
    return {}


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("learner-1", signal.SIGKILL),
        pytest.param("rollout-0", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("teacher-0", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("rollout-0", signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param("learner-0", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_loses_a_worker_ends_with_the_weights_of_one_that_does_not(
    overrides: Callable[..., list[str]],
    tmp_path: Path,
    undisturbed: dict[str, dict[str, torch.Tensor]],
    name: str,
    sent: signal.Signals,
) -> None:
    arguments = overrides(
        "num_steps=6", "save_every=2", "deterministic=true", "fault.backoff_s=0.1", "fault.hang_timeout_s=8"
    )
    if not undisturbed:
        _run([*arguments, "name=whole"])
        undisturbed["weights"] = load_file(tmp_path / "runs" / "whole" / "export" / "model.safetensors")
    run_dir = tmp_path / "runs" / "test"

    def harm(run: subprocess.Popen[str]) -> None:
        _wait_for_step(run_dir / "metrics.jsonl", 3, run)
        _worker(run, name).send_signal(sent)

    _check_survived(_run(arguments, harm=harm), run_dir, lost=name, expected=undisturbed["weights"])


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_starts_is_started_again(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "test"

    def harm(run: subprocess.Popen[str]) -> None:
        until = time.monotonic() + _WAIT_S
        while not (run_dir / "logs" / "learner-0.log").exists():  # built in rollout's and the teacher's company
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.01)
        _worker(run, "learner-0").send_signal(signal.SIGKILL)

    output = " ".join(_run(overrides("fault.backoff_s=0.1"), harm=harm).split())
    assert "lost a worker at its start: all workers are started again in 0.1 s, from the start" in output
    assert [line["step"] for line in _lines(run_dir / "metrics.jsonl")] == [0, 1, 2]


def _check_survived(output: str, run_dir: Path, *, lost: str, expected: dict[str, torch.Tensor]) -> None:
    (event,) = [line for line in _lines(run_dir / "events.jsonl") if line["kind"] == "workers_restarted"]
    assert event["message"].startswith(f"lost {lost}: all workers are started again in 0.1 s, from the checkpoint of")
    assert "all workers are started again" in " ".join(output.split())
    steps = _lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4, 5, 6]
    assert max(line.get("fault/restarts", 0) for line in steps) == 1
    found = load_file(run_dir / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [tensor for tensor in expected if not torch.equal(found[tensor], expected[tensor])] == []
