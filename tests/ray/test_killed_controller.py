"""The controller dies by SIGKILL, in the middle of a save: the same command goes on and ends with the same weights."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from head_node import PROJECT
from safetensors.torch import load_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_WAIT_S = 180


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "opd_ray.train", *arguments],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(arguments: list[str]) -> str:
    run = _start(arguments)
    output, _ = run.communicate(timeout=_WAIT_S)
    assert run.returncode == 0, output
    return output


def _kill_when(run: subprocess.Popen[str], seen: Callable[[], bool]) -> list[psutil.Process]:
    """Kill a run as soon as something is seen; return the processes that it had started."""
    until = time.monotonic() + _WAIT_S
    while not seen():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.001)
    children = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    return children


def _shared_memory() -> int:
    """Return the bytes of shared memory in use, those of unlinked files too."""
    return shutil.disk_usage("/dev/shm").used


def test_a_run_killed_in_a_save_and_one_with_a_damaged_checkpoint_end_with_the_undisturbed_weights(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = overrides("num_steps=4", "save_every=1", "deterministic=true", "resume=auto", "eval_every=2")
    whole, killed = [[*arguments, f"name={name}"] for name in ("whole", "killed")]
    _finish(whole)
    shared = _shared_memory()

    run_dir = tmp_path / "runs" / "killed"
    checkpoints = run_dir / "checkpoints"
    children = _kill_when(_start(killed), lambda: (checkpoints / ".step-000003.partial").exists())
    _, alive = psutil.wait_procs(children, timeout=120)
    assert [process.cmdline()[:1] for process in alive] == []
    assert _shared_memory() <= shared
    assert not (checkpoints / "step-000003").exists()
    weights = next((checkpoints / "step-000002" / "deepspeed").iterdir())
    weights.write_bytes(weights.read_bytes()[:-100])

    words = _finish(killed)
    assert "set aside as damaged-step-000002" in " ".join(words.split())
    events = [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert "checkpoint_damaged" in events
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    expected = load_file(tmp_path / "runs" / "whole" / "export" / "model.safetensors")
    found = load_file(run_dir / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
