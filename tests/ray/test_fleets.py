"""The fleets on a real Ray cluster: streaming between them, and what is said when a worker dies."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from helpers import compose_config, make_request

from opd_ray.protocol import Payload, ScoreRequest
from opd_ray.requests import ObjectiveIds
from workers import connected, open_fleets

pytestmark = pytest.mark.ray

_DEADLINE_S = 180


@pytest.mark.slow
def test_a_finished_group_is_scored_while_others_still_generate(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = compose_config(overrides("rollout.max_response_tokens=96", "learner.max_tokens_per_micro_batch=120"))
    requests = [
        make_request(1, 2, 3, version=0, seed=1, num_samples=num_samples, max_response_tokens=max_response_tokens)
        for num_samples, max_response_tokens in ((8, 96), (1, 1))
    ]
    ids = ObjectiveIds(masked=(), equivalent=())
    room = {"teacher": config.data.max_prompt_tokens}
    with (
        connected(config),
        open_fleets(config, vocab_size=32, ids=ids, prompt_tokens=room, log_dir=tmp_path) as fleets,
    ):
        fleets.rollout.load(fleets.learner.publish(0))
        for _ in range(2):  # the first calls warm the engines up
            long_group, short_group = fleets.rollout.generate(requests)
            (short_score,) = fleets.teacher.score([short_group], ScoreRequest(payload=Payload.hidden))
            first, _ = ray.wait([short_score.summary, long_group.summary], num_returns=1)
            ray.get(long_group.summary)
        assert first == [short_score.summary]


@pytest.mark.slow
def test_groups_of_one_call_are_those_of_calls_of_their_own(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = compose_config(overrides("rollout.groups_per_call=2", "learner.max_tokens_per_micro_batch=120"))
    requests = [make_request(1, 2, 3 + n, version=0, seed=n, num_samples=1 + n) for n in range(3)]
    ids = ObjectiveIds(masked=(), equivalent=())
    room = {"teacher": config.data.max_prompt_tokens}
    asked = ScoreRequest(payload=Payload.hidden)
    with (
        connected(config),
        open_fleets(config, vocab_size=32, ids=ids, prompt_tokens=room, log_dir=tmp_path) as fleets,
    ):
        fleets.rollout.load(fleets.learner.publish(0))
        together = fleets.rollout.generate(requests)
        alone = [handle for request in requests for handle in fleets.rollout.generate([request])]
        scores = [*fleets.teacher.score(together, asked), *fleets.teacher.score(alone, asked)]
        summaries = fleets.rollout.summaries(together)
        assert [len(summary.response_lengths) for summary in summaries] == [1, 2, 3]
        for one, other in zip(together, alone, strict=True):
            assert ray.get(one.group).response_ids.tolist() == ray.get(other.group).response_ids.tolist()
        num_tokens = [summary.num_tokens for summary in fleets.teacher.summaries(scores)]
        assert num_tokens == [sum(summary.response_lengths) for summary in summaries] * 2


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_its_name_and_not_rays_stack(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = overrides("num_steps=100000", "eval_every=0", "fault.max_restarts=0")
    command = [sys.executable, "-m", "opd_ray.train", *arguments]
    run_dir = tmp_path / "runs" / "test"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        _wait_until(lambda: _has_steps(run_dir / "metrics.jsonl"))
        _worker_of(run.pid, "RolloutWorker").send_signal(signal.SIGKILL)
        _, errors = run.communicate(timeout=_DEADLINE_S)
    assert run.returncode == 1
    assert errors.startswith("error: rollout-0 died: ")
    assert "rollout-0.log" in errors
    assert len(errors.splitlines()) < 25
    assert "Traceback" not in errors
    assert "rollout-0 died" in (run_dir / "events.jsonl").read_text()


@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_the_run_with_its_own_error(
    overrides: Callable[..., list[str]],
) -> None:
    command = [sys.executable, "-m", "opd_ray.train", *overrides("+teacher.engine_args.max_num_seqs=-3")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("error: teacher-0 failed")
    assert "max_num_seqs" in run.stderr
    assert "site-packages/ray/" not in run.stderr


def _has_steps(path: Path) -> bool:
    return path.exists() and len(path.read_text().splitlines()) > 2


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _DEADLINE_S
    while not holds():
        assert time.monotonic() < end, "the run never got there"
        time.sleep(0.2)


def _worker_of(pid: int, name: str) -> psutil.Process:
    """Return the worker process of a run's own cluster."""
    found = [p for p in psutil.Process(pid).children(recursive=True) if f"ray::{name}" in " ".join(p.cmdline())]
    assert found, f"no {name} below process {pid}"
    return found[0]
