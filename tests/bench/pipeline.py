"""Part `pipeline`: the loop and the fleets over actors that sleep, against what their sleeping alone would take."""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from harness import Figure, at_most
from pipeline_work import CASES, MAX_TOKENS, NUM_GROUPS, NUM_ROLLOUTS, NUM_SAMPLES, NUM_TEACHERS, Workload
from sleepers import SleepingLearner, SleepingRollout, SleepingTeacher
from transformers import Qwen3Config

from opd_ray.assembly import build_loop
from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.config.data import DataConfig, DataKind
from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import (
    BatchConfig,
    Config,
    LearnerConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
)
from opd_ray.config.services import ClusterConfig, TrackingConfig, TrackingKind
from opd_ray.controller import Fleets
from opd_ray.data.prompts import PromptSets
from opd_ray.dispatch import Place
from opd_ray.protocol import Metrics, Prompt
from opd_ray.quarantine import DiskQuarantine
from opd_ray.requests import ObjectiveIds
from opd_ray.routing import DEFAULT_TEACHER
from opd_ray.state import RunDir
from opd_ray.tracking import RunTracker
from workers import WorkerClasses, connected, open_fleets

_PART = "pipeline"
_PROMPT_TOKENS = 16
_NUM_STEPS, _NUM_STRICT_STEPS = 50, 25  # the latter of max_staleness = 0, which are longer
_MAX_PIPELINED, _MAX_STRICT = 1.05, 1.02
_SLEEPERS = WorkerClasses(rollout=SleepingRollout, teacher=SleepingTeacher, learner=SleepingLearner)


def pipeline() -> Iterator[Figure]:
    """Yield the figures of the part; about 11 minutes.

    <case>_s0 is the run's time over the sum of its critical paths, <case>_s1 over the longest of its three phases, the
    first step aside. The most loaded pool without a pause is a bound below that: <case>_s1_busiest is the run's time
    over it, and <case>_s1_unhindered what the same schedule would take without any overhead: what is between that and 1
    is the window's and the long tail's doing. How all are computed: `pipeline_work.Workload`.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder))
        with connected(config), _fleets(config) as fleets:
            for case in CASES:
                yield from _strict(config, fleets, case)
                yield from _pipelined(config, fleets, case, max_staleness=1, limit=_MAX_PIPELINED)
            for case in ("balanced", "rollout_bound"):
                yield from _pipelined(config, fleets, case, max_staleness=2)
            over = replace(config, max_staleness=1, rollout=replace(config.rollout, overprovision=1.0))
            work = Workload(case="rollout_bound", num_steps=_NUM_STEPS)
            times, _ = _run(over, fleets, work)
            yield _of_busiest(
                (times[-1] - times[0]) / work.busiest_s(), name="rollout_bound_s1_overprovision_1_busiest"
            )


def _strict(config: Config, fleets: Fleets, case: str) -> Iterator[Figure]:
    work = Workload(case=case, num_steps=_NUM_STRICT_STEPS)
    times, served = _run(replace(config, max_staleness=0), fleets, work)
    seconds = times[-1] - times[0]
    critical_s = work.unhindered_s(served, max_staleness=0)
    yield _overhead(seconds - critical_s, work, name=f"{case}_s0")
    yield at_most(_MAX_STRICT, part=_PART, name=f"{case}_s0", value=seconds / critical_s, unit="of critical path")


def _pipelined(
    config: Config, fleets: Fleets, case: str, *, max_staleness: int, limit: float = math.inf
) -> Iterator[Figure]:
    work = Workload(case=case, num_steps=_NUM_STEPS)
    times, served = _run(replace(config, max_staleness=max_staleness), fleets, work)
    seconds = times[-1] - times[0]
    unhindered_s = work.unhindered_s(served, max_staleness=max_staleness)
    name = f"{case}_s{max_staleness}"
    yield _of_busiest(unhindered_s / work.busiest_s(), name=f"{name}_unhindered")
    yield _of_busiest(seconds / work.busiest_s(), name=f"{name}_busiest")
    yield _overhead(seconds - unhindered_s, work, name=name)
    value = (times[-1] - times[1]) / work.longest_phase_s(served)
    yield at_most(limit, part=_PART, name=name, value=value, unit="of longest phase")


def _of_busiest(value: float, *, name: str) -> Figure:
    return Figure(part=_PART, name=name, value=value, unit="of busiest pool")


def _overhead(seconds: float, work: Workload, *, name: str) -> Figure:
    return Figure(part=_PART, name=f"{name}_overhead", value=1e3 * seconds / work.num_steps, unit="ms/step")


def _config(folder: Path) -> Config:
    """Return the configuration that all cases share. A model's folder has to be there, nobody reads its weights."""
    Qwen3Config(hidden_size=64, num_hidden_layers=1).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return Config(
        name=_PART,
        num_steps=_NUM_STEPS,
        runs_dir=str(folder / "runs"),
        student=StudentConfig(path=str(folder)),
        teacher=TeacherConfig(path=str(folder), num_workers=NUM_TEACHERS, cpus_per_worker=0.1),
        data=DataConfig(kind=DataKind.task, task=_PART, max_prompt_tokens=_PROMPT_TOKENS),
        batch=BatchConfig(num_prompts=NUM_GROUPS),
        rollout=RolloutConfig(
            num_workers=NUM_ROLLOUTS,
            cpus_per_worker=0.1,
            samples_per_prompt=NUM_SAMPLES,
            max_response_tokens=MAX_TOKENS,
        ),
        objective=ObjectiveConfig(kind=ObjectiveKind.sampled),
        learner=LearnerConfig(cpus_per_rank=0.1),
        cluster=ClusterConfig(),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def _fleets(config: Config):
    return open_fleets(
        config,
        vocab_size=1,
        ids=ObjectiveIds(masked=(), equivalent=()),
        prompt_tokens={DEFAULT_TEACHER: _PROMPT_TOKENS},
        log_dir=Path(config.runs_dir) / "logs",
        classes=_SLEEPERS,
    )


def _run(config: Config, fleets: Fleets, work: Workload) -> tuple[list[float], list[list[Place]]]:
    """Run a case; return when its first request was made and when each step was over, and who generated what."""
    prompts = [
        Prompt(ids_P=np.zeros(_PROMPT_TOKENS, dtype=np.int32), index=i, task=work.case, verifier=work.case, answer=None)
        for i in range(NUM_GROUPS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        run_dir, line = RunDir(path=Path(folder)), _Line()
        loop = build_loop(
            replace(config, num_steps=work.num_steps),
            fleets=fleets,
            training=fleets,
            prompts=PromptSets(train=prompts, held_out=[], num_dropped=0, num_held_back=0),
            checkpoints=DiskCheckpoints(folder=run_dir.checkpoints),
            tracker=RunTracker(run_dir, step=0, num_samples=2, sinks=[], line=line),
            quarantine=DiskQuarantine(run_dir, say=line.say),
        )
        replace(loop, evaluator=_Evaluator()).run()
    assert len(line.times) == 1 + work.num_steps  # of step 0, before the first request, and after every update
    served: list[list[Place]] = ray.get([worker.places.remote() for worker in fleets.rollout.workers])
    return line.times, served


class _Evaluator:
    def evaluate(self, version: int) -> Metrics:  # noqa: ARG002
        return {}


class _Line:
    def __init__(self) -> None:
        self.times: list[float] = []

    def show_step(self, step: int, metrics: Metrics) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())

    def say(self, message: str) -> None:
        raise RuntimeError(message)
