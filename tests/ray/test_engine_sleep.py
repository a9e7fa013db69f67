"""Engines that sleep and wake, as plain objects without Ray; on a CPU they keep their memory and stop scheduling."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from helpers import load_version, make_group, make_request, reference_logprobs, reference_model, sampled

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import Dtype, RolloutConfig, TeacherConfig
from opd_ray.protocol import Payload, SampledScore, ScoreRequest, TrajectoryGroup
from workers.rollout.worker import RolloutWorker, logprob_args
from workers.teacher.worker import TeacherWorker

pytestmark = pytest.mark.ray

_ENGINE_ARGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
_SHORT_S = 0.5
_GROUP = make_group([1, 2, 3], [4, 5], [6, 7, 8, 9])
_REQUEST = ScoreRequest(payload=Payload.sampled)


async def _sample(worker: RolloutWorker, *, version: int, max_response_tokens: int = 12) -> TrajectoryGroup:
    request = make_request(1, 2, 3, version=version, max_response_tokens=max_response_tokens)
    _, group = await worker.generate(request)
    return group


def _rollout(folder: str) -> RolloutWorker:
    config = RolloutConfig(dtype=Dtype.float32, engine_args=_ENGINE_ARGS)
    arguments = logprob_args(config, ObjectiveConfig(kind=ObjectiveKind.sampled))
    return RolloutWorker(model_path=folder, config=config, max_model_tokens=128, logprob_args=arguments)


def test_after_sleeping_a_rollout_worker_serves_nothing_until_it_has_weights_again(model_folder: Any) -> None:
    folder = model_folder(seed=1)
    model = reference_model(folder)

    async def scenario() -> None:
        worker = _rollout(folder)
        await load_version(worker, model, 0)
        await _sample(worker, version=0)
        await worker.sleep()
        assert await worker.held_version() == -1
        waiting = asyncio.create_task(_sample(worker, version=0))
        await worker.wake()
        done, _ = await asyncio.wait([waiting], timeout=_SHORT_S)
        assert not done
        await load_version(worker, model, 1)
        for group in (await waiting, await _sample(worker, version=1)):
            truth_N = sampled(reference_logprobs(model, group), group).detach().numpy()
            np.testing.assert_allclose(group.sampled_logprobs, truth_N, atol=1e-5)
            assert (group.token_versions == 1).all()

    asyncio.run(scenario())


def test_an_engine_with_running_sequences_does_not_fall_asleep_under_them(model_folder: Any) -> None:
    folder = model_folder(seed=1)

    async def scenario() -> None:
        worker = _rollout(folder)
        await load_version(worker, reference_model(folder), 0)
        running = asyncio.create_task(_sample(worker, version=0, max_response_tokens=100))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match=r"cluster\.sleep=false keeps it awake"):
            await worker.sleep()
        assert len((await running).response_ids) > 0

    asyncio.run(scenario())


def _teacher(folder: str) -> TeacherWorker:
    config = TeacherConfig(path=folder, dtype=Dtype.float32, engine_args=_ENGINE_ARGS)
    return TeacherWorker(config=config, max_model_tokens=128, vocab_size=30, temperature=1.0, equivalent_ids=())


def test_groups_that_come_while_a_teacher_sleeps_are_scored_after_it_woke(model_folder: Any) -> None:
    folder = model_folder(seed=2)

    async def scenario() -> None:
        worker = _teacher(folder)
        await worker.ready()
        _, before = await worker.score(_GROUP, _REQUEST)
        await worker.sleep()
        waiting = asyncio.create_task(worker.score(_GROUP, _REQUEST))
        done, _ = await asyncio.wait([waiting], timeout=_SHORT_S)
        assert not done
        await worker.wake()
        _, after = await waiting
        assert isinstance(before, SampledScore)
        assert isinstance(after, SampledScore)
        np.testing.assert_array_equal(after.logprobs_N, before.logprobs_N)

    asyncio.run(scenario())


def test_a_teacher_that_wakes_with_one_changed_value_says_which_and_scores_nothing_more(model_folder: Any) -> None:
    folder = model_folder(seed=2)

    def disturb(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[3].add_(1)

    async def scenario() -> None:
        worker = _teacher(folder)
        await worker.ready()
        await worker.sleep()
        worker._engine.apply_model(disturb)
        with pytest.raises(RuntimeError, match=r"1 of \d+ tensors differ, the first is model.norm.weight"):
            await worker.wake()
        waiting = asyncio.create_task(worker.score(_GROUP, _REQUEST))
        done, _ = await asyncio.wait([waiting], timeout=_SHORT_S)
        assert not done
        waiting.cancel()

    asyncio.run(scenario())
