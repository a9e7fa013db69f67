"""deterministic=true: the weights are the same bits whatever arrives when; without it they agree up to rounding."""

import asyncio
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from fakes import FakeCheckpoints, FakeQuarantine, FakeTracker
from helpers import compose_config
from safetensors.torch import load_file

from opd_ray.assembly import build_loop
from opd_ray.data.models import inspect_models
from opd_ray.plan import plan_run
from workers import WorkerClasses, connected, open_fleets
from workers.learner.worker import LearnerWorker
from workers.rollout.worker import RolloutWorker
from workers.teacher.actor import TeacherActor

pytestmark = pytest.mark.ray

_MAX_DELAY_S = 0.2
_MAX_RELATIVE_GAP = 1e-3  # without deterministic=true: of the distance the weights have gone


def _delay_s() -> float:
    return random.SystemRandom().uniform(0, _MAX_DELAY_S)


class SlowRolloutWorker(RolloutWorker):
    """Takes requests and weights in any order and at any time."""

    async def generate(self, *request: Any) -> Any:
        await asyncio.sleep(_delay_s())
        return await super().generate(*request)

    async def prepare(self, *weights: Any) -> None:
        await asyncio.sleep(_delay_s())
        await super().prepare(*weights)

    async def commit(self, *version: Any) -> None:
        await asyncio.sleep(_delay_s())
        await super().commit(*version)


class SlowTeacher(TeacherActor):
    """Scores groups in any order and at any time."""

    async def score(self, *group: Any) -> Any:
        await asyncio.sleep(_delay_s())
        return await super().score(*group)


class SlowLearner(LearnerWorker):
    """One rank lags behind the other."""

    def update(self, *batch: Any) -> Any:
        time.sleep(_delay_s())
        return super().update(*batch)


_SLOW = WorkerClasses(rollout=SlowRolloutWorker, teacher=SlowTeacher, learner=SlowLearner)


def _trained(arguments: list[str], folder: Path, classes: WorkerClasses) -> dict[str, torch.Tensor]:
    """Run a configuration and return the student's weights."""
    config = compose_config(arguments)
    plan = plan_run(
        config,
        inspect_models(student_path=config.student.path, teachers={"teacher.path": config.teacher}),
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with (
        connected(config),
        open_fleets(
            config,
            vocab_size=plan.models.vocab_size,
            ids=plan.ids,
            prompt_tokens=plan.prompt_tokens,
            log_dir=folder / "logs",
            classes=classes,
        ) as fleets,
    ):
        build_loop(
            config,
            fleets=fleets,
            training=fleets,
            prompts=plan.prompts,
            checkpoints=FakeCheckpoints([]),
            tracker=FakeTracker([]),
            quarantine=FakeQuarantine(),
        ).run()
        fleets.learner.export(str(folder / "export"))
    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture
def arguments(overrides: Callable[..., list[str]]) -> list[str]:
    return overrides(
        "num_steps=3",
        "batch.num_prompts=8",
        "rollout.samples_per_prompt=3",
        "rollout.num_workers=2",
        "rollout.cpus_per_worker=0.25",
        "teacher.num_workers=2",
        "teacher.cpus_per_worker=0.25",
        "eval_every=2",
    )


@pytest.mark.slow
def test_delays_change_no_bit_of_the_weights(arguments: list[str], tmp_path: Path) -> None:
    deterministic = [*arguments, "deterministic=true"]
    plain = _trained(deterministic, tmp_path / "plain", WorkerClasses())
    delayed = _trained(deterministic, tmp_path / "delayed", _SLOW)
    assert plain.keys() == delayed.keys()
    assert [name for name in plain if not torch.equal(plain[name], delayed[name])] == []

    rounded = _trained(arguments, tmp_path / "rounded", _SLOW)  # the same seeds, without fixed engine batches
    start = load_file(Path(compose_config(arguments).student.path) / "model.safetensors")
    gone = sum(float((plain[name] - start[name]).square().sum()) for name in plain) ** 0.5
    gap = sum(float((plain[name] - rounded[name]).square().sum()) for name in plain) ** 0.5
    assert gap < _MAX_RELATIVE_GAP * gone
