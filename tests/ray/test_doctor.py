"""The doctor on the real stack: a sound set-up is green, one that scores something else is not."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import compose_config
from rich.console import Console

import workers
from opd_ray.console import RunConsole
from opd_ray.data.models import inspect_models
from opd_ray.data.prompts import load_prompts
from opd_ray.doctor import examine
from opd_ray.engine_checks import EngineTest, handful, student_as_teacher
from opd_ray.preflight import Status
from opd_ray.preflight.engines import gap, same_temperature, self_kl
from opd_ray.train import train

pytestmark = pytest.mark.ray

_DEADLINE_S = 300


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
    assert not (tmp_path / "runs").exists()


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
        groups = sound.sample(handful(prompts))
        (cold_N,) = replace(sound, temperature=1.0).score(same, groups=groups, role="cold")
        (other_N,) = sound.score(other, groups=groups, role="other")
    sampler_N = np.concatenate([group.sampled_logprobs for group in groups])
    for scored_N in (cold_N, other_N):
        wrong, dtype = gap(sampler_N, scored_N), config.rollout.dtype
        assert self_kl(wrong, dtype=dtype, signal=1.0).status is Status.error
        assert same_temperature(wrong, dtype=dtype, temperature=0.7, signal=1.0).status is Status.error


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
