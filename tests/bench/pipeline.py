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
from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    DataKind,
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
from opd_ray.state import DiskCheckpoints, RunDir
from opd_ray.tracking import RunTracker
from workers import WorkerClasses, connected, open_fleets

_PART = "pipeline"
_PROMPT_TOKENS = 16
_NUM_STEPS, _NUM_STRICT_STEPS = 50, 25  # the latter of max_staleness = 0, which are longer
_MAX_PIPELINED, _MAX_STRICT = 1.05, 1.02
_SLEEPERS = WorkerClasses(rollout=SleepingRollout, teacher=SleepingTeacher, learner=SleepingLearner)


def pipeline() -> Iterator[Figure]:
    """Yield the figures of the part; about 6 minutes.

    <case>_s1 is the run's time over that of its most loaded pool; <case>_s1_unhindered is what the same schedule would
    take of it without any overhead: what is between that and 1 is the window's and the long tail's doing. <case>_s0 is
    the run's time over the sum of its critical paths. How all are computed: `pipeline_work.Workload`.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder))
        with connected(config), _fleets(config) as fleets:
            for case in CASES:
                yield _strict(config, fleets, case)
                yield from _pipelined(config, fleets, case, max_staleness=1, limit=_MAX_PIPELINED)
            for case in ("balanced", "rollout_bound"):
                yield from _pipelined(config, fleets, case, max_staleness=2)
            over = replace(config, max_staleness=1, rollout=replace(config.rollout, overprovision=1.0))
            work = Workload(case="rollout_bound", num_steps=_NUM_STEPS)
            seconds, _ = _run(over, fleets, work)
            yield _ratio(seconds / work.busiest_s(), name="rollout_bound_s1_overprovision_1")


def _strict(config: Config, fleets: Fleets, case: str) -> Figure:
    work = Workload(case=case, num_steps=_NUM_STRICT_STEPS)
    seconds, served = _run(replace(config, max_staleness=0), fleets, work)
    ratio = seconds / work.unhindered_s(served, max_staleness=0)
    return at_most(_MAX_STRICT, part=_PART, name=f"{case}_s0", value=ratio, unit="of critical path")


def _pipelined(
    config: Config, fleets: Fleets, case: str, *, max_staleness: int, limit: float = math.inf
) -> Iterator[Figure]:
    work = Workload(case=case, num_steps=_NUM_STEPS)
    seconds, served = _run(replace(config, max_staleness=max_staleness), fleets, work)
    unhindered_s = work.unhindered_s(served, max_staleness=max_staleness)
    name = f"{case}_s{max_staleness}"
    yield _ratio(unhindered_s / work.busiest_s(), name=f"{name}_unhindered")
    yield _ratio(seconds / work.busiest_s(), name=name, limit=limit)


def _ratio(value: float, *, name: str, limit: float = math.inf) -> Figure:
    unit = "of busiest pool"
    if limit == math.inf:
        return Figure(part=_PART, name=name, value=value, unit=unit)
    return at_most(limit, part=_PART, name=name, value=value, unit=unit)


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


def _run(config: Config, fleets: Fleets, work: Workload) -> tuple[float, list[list[Place]]]:
    """Run a case and return the seconds from its first request to the end of its last step, and who generated what."""
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
    return line.times[-1] - line.times[0], served


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
