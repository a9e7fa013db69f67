"""The doctor on the real stack: a sound set-up is green, one that scores something else is not."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import compose_config, read_lines, run_train
from rich.console import Console
from transformers import AutoModelForCausalLM

import workers
from opd_ray.console import RunConsole
from opd_ray.data.models import inspect_models
from opd_ray.data.prompts import load_prompts
from opd_ray.doctor import examine
from opd_ray.engine_checks import EngineTest, groups_of, handful, student_as_teacher
from opd_ray.mismatch import MismatchWatch
from opd_ray.preflight import Status
from opd_ray.preflight.engines import engine_gap_metrics, gap, reference_gap, same_temperature, self_kl
from opd_ray.protocol import TrajectoryGroup
from opd_ray.train import train

pytestmark = pytest.mark.ray

_DEADLINE_S = 300


@pytest.mark.slow
def test_a_sound_set_up_is_green_with_two_workers_of_a_teacher(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = compose_config(
        overrides(
            "rollout.temperature=0.7", "teacher.num_workers=2", "teacher.cpus_per_worker=0.25", "rollout.top_p=1.0"
        )
    )
    findings = examine(config, engines=True)
    assert [f for f in findings if f.status is not Status.ok] == []
    names = {f.name for f in findings}
    assert {"OPD signal", "student as teacher", "temperature", "replicas of teacher", "cluster", "versions"} <= names
    (engine,) = (f for f in findings if f.name == "engine of teacher")
    assert engine.found.startswith("its log-probs differ from a float32 forward of the checkpoint by ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_other_weights_or_another_temperature_behind_the_score_turn_red(
    overrides: Callable[..., list[str]], tmp_path: Path, model_folder: Any
) -> None:
    config = compose_config(overrides("rollout.temperature=0.7"))
    models = inspect_models(student_path=config.student.path, teachers={"teacher.path": config.teacher})
    prompts = load_prompts(config, tokenizer=models.tokenizer).held_out
    same = student_as_teacher(config)
    other = replace(same, path=model_folder(seed=3))
    sound = EngineTest(config=config, vocab_size=models.vocab_size, temperature=0.7, log_dir=tmp_path)
    with workers.connected(config):
        handles = sound.sample(handful(prompts, num_ranks=2))
        (cold_N,) = replace(sound, temperature=1.0).score(same, handles=handles, role="cold")
        other_kl, other_N = sound.kl(other, handles=handles, role="other")
        groups = groups_of(handles)
        cold = sound.reference_gap(same, handles=handles, by_engine_N=cold_N, num_tokens=16)
    sampler_N, dtype = np.concatenate([group.sampled_logprobs for group in groups]), config.rollout.dtype
    for scored_N in (cold_N, other_N):
        wrong = gap(sampler_N, scored_N)
        assert same_temperature(wrong, dtype=dtype, temperature=0.7, signal=1.0).status is Status.error
    assert self_kl(other_kl, dtypes=[dtype], signal=1.0).status is Status.error
    assert other_kl == pytest.approx(
        _exact_kl(config.student.path, other.path, groups=groups, temperature=0.7), rel=1e-3
    )
    # A score at another temperature than the run's is a teacher that disagrees with its checkpoint.
    assert reference_gap("teacher", cold, dtype=dtype, signal=1.0).status is Status.warning
    assert MismatchWatch().warnings(engine_gap_metrics({"teacher": (cold, 1.0)}))


@pytest.mark.slow
def test_a_run_that_asks_for_it_compares_its_teacher_with_the_checkpoint_before_the_first_step(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    _, screen = run_train(overrides("num_steps=1", "teacher.reference_tokens=16"))
    lines = read_lines(tmp_path / "runs" / "test" / "metrics.jsonl")
    assert 0 < lines[0]["teacher/engine_gap_mean"] < 1e-4
    assert lines[0]["teacher/engine_gap_relative"] < 1e-3
    assert "teacher/engine_gap_mean" not in lines[1]
    assert lines[1]["rollout/logprob_gap_mean"] < 1e-4
    assert lines[1]["distill/signal"] > 0.1
    assert lines[1]["rollout/logprob_gap_relative"] < 1e-3
    assert "warning" not in screen


@pytest.mark.slow
def test_a_sampler_that_rounds_more_than_the_learner_is_warned_of_once(
    overrides: Callable[..., list[str]], tmp_path: Path, model_folder: Any
) -> None:
    """The teacher is the student itself: next to no signal, so that bfloat16 weighs more than all of it."""
    same = model_folder(seed=1)
    _, screen = run_train(overrides(f"teacher.path={same}", "rollout.dtype=bfloat16", "learner.lr=1e-9"), width=300)
    events = read_lines(tmp_path / "runs" / "test" / "events.jsonl")
    (event,) = [e for e in events if e["kind"] == "engine_mismatch"]
    assert event["message"].startswith("step 1: rollout/logprob_gap_mean ")
    assert screen.count("warning: rollout/logprob_gap_mean ") == 1


@pytest.mark.slow
def test_the_command_says_in_json_and_by_its_exit_code_what_is_wrong(overrides: Callable[..., list[str]]) -> None:
    run = _doctor(
        *overrides(
            "--no-engines",
            "--json",
            "rollout.max_response_tokens=1000",
            "learner.num_ranks=1",
            "learner.max_tokens_per_micro_batch=2000",
            "learner.cpus_per_rank=1000",
        )
    )
    assert run.returncode == 1
    findings = json.loads(run.stdout)
    assert all(set(f) == {"name", "status", "found", "advice"} for f in findings)
    assert {f["name"] for f in findings if f["status"] == "error"} == {"context", "cluster"}

    run = _doctor("experiment=demo", "objectve=full")
    assert run.returncode == 2
    assert run.stderr == "error: objectve: no such key; did you mean objective?\n"


def test_a_run_is_refused_for_what_the_doctor_calls_red_before_any_worker_starts(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    too_long = ["rollout.max_response_tokens=1000", "learner.max_tokens_per_micro_batch=2000"]
    with pytest.raises(ValueError, match="context: longest sequence 1,024 tokens"):
        train(compose_config(overrides(*too_long)), RunConsole(Console(file=io.StringIO())))
    assert not (tmp_path / "runs").exists()


def _doctor(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "opd_ray.doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)


def _exact_kl(student: str, teacher: str, *, groups: Sequence[TrajectoryGroup], temperature: float) -> float:
    """KL(student || teacher) at every response token's prefix, by transformers in float32."""
    p, q = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher))
    parts = []
    for group in groups:
        for start, end in itertools.pairwise(group.offsets):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, group.response_ids[start:end]])).long()[None]
            with torch.no_grad():
                log_p, log_q = (
                    (m(ids).logits[0, len(group.prompt_ids) - 1 : -1] / temperature).log_softmax(-1) for m in (p, q)
                )
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(parts).mean())
