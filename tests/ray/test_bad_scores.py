"""Whole runs whose teacher is a server: one that cannot score some groups, one that can score none, one that dies."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import CONFIG_DIR, compose_config, read_lines
from stub_teacher_server import StubServer, failed, nan, refused, serving, short
from vllm_server import KEY, KEY_VARIABLE, vllm_serve

from opd_ray.console import RunConsole
from opd_ray.train import train

pytestmark = pytest.mark.ray

Overrides = Callable[..., list[str]]
_END_TIMEOUT_S = 300.0
_QUICK = ("teacher.http.timeout_s=5", "teacher.http.max_attempts=2", "teacher.http.backoff_s=0.05")


@pytest.fixture
def by_server(overrides: Overrides, model_folder: Any) -> Overrides:
    """Return a function that gives the overrides of a run with an HTTP teacher that has the student's tokenizer."""

    def build(url: str, *more: str) -> list[str]:
        return overrides(
            "teacher=http",
            f"teacher.path={model_folder(seed=1)}",
            f"teacher.http.urls=['{url}']",
            "objective=sampled",
            "eval.samples_per_prompt=1",
            *_QUICK,
            *more,
        )

    return build


@contextmanager
def _command(overrides: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Start the train command, and end it on leaving if it has not ended itself."""
    command = [sys.executable, "-m", "opd_ray.train", *overrides]
    process = subprocess.Popen(
        command, cwd=CONFIG_DIR.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_groups_that_a_teacher_cannot_score_are_quarantined_and_replaced_and_the_run_goes_on(
    by_server: Overrides, tmp_path: Path
) -> None:
    defects = [nan, short, refused, failed]
    stub = StubServer(defect=lambda n: defects[n // 7 % 4] if n % 7 == 0 else None)
    # A request that fails with 500 is tried again, and then succeeds; all the others are bad scores at once.
    with serving(stub):
        summary = train(
            compose_config(by_server(stub.url, "num_steps=6", "batch.max_bad_fraction=1", "eval_every=2")), RunConsole()
        )
    run_dir = tmp_path / "runs" / "test"
    steps, bad = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "quarantine.jsonl")
    assert [m["step"] for m in steps] == list(range(7))
    assert all(m["rollout/num_responses"] == 4 * 2 for m in steps[1:])
    for m in steps[1:]:
        assert m["teacher/bad_groups"] == sum(b["step"] == m["step"] and not b["held_out"] for b in bad)
        assert m["time/wait_rollout_s"] > 0
        assert m["teacher/bytes_per_token"] == 4
    for m in steps:
        if "eval/bad_groups" in m:
            assert m["eval/bad_groups"] == sum(b["step"] == m["step"] and b["held_out"] for b in bad)
    reasons = " | ".join(b["reason"] for b in bad)
    assert "the answer cannot be read" in reasons  # NaN is no JSON
    assert "prompt_logprobs of" in reasons
    assert "answered 400: this sequence is not taken" in reasons
    assert "Out of range" not in reasons
    assert summary["bad_groups"] == sum(m["teacher/bad_groups"] for m in steps[1:]) > 0
    assert all(b["text"] and b["task"] == "sort" and b["teacher"] == "teacher" for b in bad)
    events = [e for e in read_lines(run_dir / "events.jsonl") if e["kind"] == "bad_group"]
    assert len(events) == len(bad)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_teacher_that_can_score_nothing_any_more_ends_the_run_which_resumes_when_it_can(
    by_server: Overrides, tmp_path: Path
) -> None:
    num_first = 1 + 4 + 4 * 2  # getting ready, the held-out prompts, and update 1
    stub = StubServer(defect=lambda n: failed if n > num_first else None)
    run_dir = tmp_path / "runs" / "test"
    with serving(stub):
        overrides = by_server(stub.url, "num_steps=3")
        with _command(overrides) as process:
            screen, _ = process.communicate(timeout=_END_TIMEOUT_S)
        assert process.returncode == 1
        (error,) = [line for line in screen.splitlines() if line.startswith("error: ")]
        assert error.startswith("error: update 2: 4 groups could not be scored, batch.max_bad_fraction=0.1 allows 1")
        assert "by teacher: teacher 4" in error
        assert "answered 500: Out of range float values" in error
        assert f"{run_dir}/quarantine.jsonl" in error
        assert "resume=auto goes on from update 1" in error
        assert screen.count("warning: ") == 1
        assert len(read_lines(run_dir / "quarantine.jsonl")) == 4
        assert read_lines(run_dir / "events.jsonl")[-1]["message"] in error
        assert [m["step"] for m in read_lines(run_dir / "metrics.jsonl")] == [0, 1]

        stub.defect = lambda _: None
        summary = train(compose_config([*overrides, "resume=auto"]), RunConsole())
    assert [m["step"] for m in read_lines(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
    assert summary["bad_groups"] == 0
    assert read_lines(run_dir / "quarantine.jsonl") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_a_real_server_ends_with_it_and_goes_on_when_it_is_back(
    by_server: Overrides, tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's model is the student, which hardly moves: the divergence must be 0 before and after."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    folder, run_dir = model_folder(seed=1), tmp_path / "runs" / "test"
    own = [f"teacher.http.api_key_env={KEY_VARIABLE}", "objective=support", "objective.top_k=8", "learner.lr=1e-9"]
    with vllm_serve(folder, log_file=tmp_path / "server.log") as server:
        overrides = by_server(server.url, *own)
        with _command([*overrides, "num_steps=1000"]) as process:
            while len(read_lines(run_dir / "metrics.jsonl")) < 4:
                assert process.poll() is None, process.communicate()[0]
                assert server.process.poll() is None, (tmp_path / "server.log").read_text(errors="replace")[-5000:]
                time.sleep(0.1)
            server.kill()
            screen, _ = process.communicate(timeout=_END_TIMEOUT_S)
    assert process.returncode == 1
    (error,) = [line for line in screen.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: teacher: the teacher's server is down, 2 attempts in")
    assert server.url in error
    last = read_lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert last >= 3
    assert f"resume=auto goes on from update {last}" in error
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{last:06d}"]

    with vllm_serve(folder, log_file=tmp_path / "again.log", port=server.port):
        summary = train(compose_config([*overrides, f"num_steps={last + 2}", "resume=auto"]), RunConsole())
    steps = read_lines(run_dir / "metrics.jsonl")
    assert [m["step"] for m in steps] == list(range(last + 3))
    assert summary["bad_groups"] == 0
    assert abs(summary["reverse_kl_before"]) < 1e-4
    assert abs(summary["reverse_kl_after"]) < 1e-4
    for m in steps[1:]:
        assert abs(m["distill/reverse_kl_support"]) < 1e-4
        assert m["train/grad_norm"] < 1e-2
        assert m["rollout/logprob_gap_max"] < 1e-4
    assert os.path.isfile(run_dir / "export" / "model.safetensors")
