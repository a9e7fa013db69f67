"""A whole node of the cluster is lost: the job goes on on another, and ends with the same weights."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from faulty_runs import rows, run_to_end
from head_node import HeadNode, head_node

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_LIMIT_S = 400


@contextmanager
def _node(head: HeadNode, number: int, *, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Add a node with two CPUs, under an address of its own, and end it on leaving."""
    log = folder / f"node{number}.log"
    node = head.start(
        "ray", "start", "--block", f"--address={head.address}", f"--node-ip-address=127.0.0.{number}", "--num-cpus=2",
        log=log,
    )  # fmt: skip
    try:
        while "Ray runtime started" not in log.read_text():  # two that start at once on a machine hinder one another
            assert node.poll() is None, log.read_text()
            time.sleep(0.1)
        yield node
    finally:
        _kill(node)


def _kill(node: "subprocess.Popen[bytes]") -> None:
    processes = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.kill()
    node.wait()


def _holds(node: "subprocess.Popen[bytes]", log: Path) -> bool:
    """Whether a node runs the worker that writes a log."""
    for process in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.Error):
            if any(file.path == str(log) for file in process.open_files()):
                return True
    return False


def test_a_run_whose_node_is_lost_goes_on_on_another(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = overrides("num_steps=6", "save_every=2", "deterministic=true", "eval_every=6", "fault.backoff_s=0.1")
    runs, lost = tmp_path / "runs", list[int]()
    with (
        head_node(tmp_path, num_cpus=0) as head,
        _node(head, 2, folder=tmp_path) as first,
        _node(head, 3, folder=tmp_path) as second,
    ):
        env = {**head.env, "RAY_ADDRESS": head.address}

        def lose_a_node(_: "subprocess.Popen[str]", run_dir: Path) -> None:
            if not lost and len(rows(run_dir / "metrics.jsonl")) > 3:
                (node,) = [n for n in (first, second) if _holds(n, run_dir / "logs" / "learner-0.log")]
                _kill(node)
                lost.append(node.pid)

        whole = run_to_end([*arguments, "name=whole"], run_dir=runs / "whole", limit_s=_LIMIT_S, env=env)
        lossy = run_to_end(
            [*arguments, "name=lossy"], run_dir=runs / "lossy", limit_s=_LIMIT_S, env=env, watch=lose_a_node
        )
    for outcome in (whole, lossy):
        assert outcome.exit_code == 0, outcome.output
        assert outcome.steps == list(range(7))
    assert len(lost) == 1
    assert "workers_restarted" in lossy.events
    assert lossy.weights == whole.weights != ""
