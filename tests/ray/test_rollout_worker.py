"""The rollout worker on a real vLLM engine, as a plain object without Ray."""

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import load_version, make_request, reference_logprobs, reference_model, sampled

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import Dtype, RolloutConfig
from opd_ray.protocol import GenerateRequest, GroupSummary, TrajectoryGroup
from workers.rollout.turns import Turn
from workers.rollout.worker import RolloutWorker, logprob_args

pytestmark = pytest.mark.ray

_ENGINE_ARGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
_PROMPT_IDS = [1, 2, 3, 4, 5] * 8  # longer than a block of the prefix cache


def _worker(folder: str, *, correct_top_p: bool = False, **options: Any) -> RolloutWorker:
    config = RolloutConfig(dtype=Dtype.float32, engine_args=_ENGINE_ARGS, **options)
    objective = ObjectiveConfig(kind=ObjectiveKind.sampled, top_k=25, correct_top_p=correct_top_p)
    return RolloutWorker(
        model_path=folder, config=config, max_model_tokens=64, logprob_args=logprob_args(config, objective)
    )


def _request(*, version: int, seed: int = 0, **sampling: Any) -> GenerateRequest:
    return make_request(*_PROMPT_IDS, version=version, seed=seed, answer="1", **{"num_samples": 4} | sampling)


async def _generate(worker: RolloutWorker, *requests: GenerateRequest) -> list[tuple[GroupSummary, TrajectoryGroup]]:
    return list(await asyncio.gather(*map(worker.generate, requests)))


def _disturb(model: torch.nn.Module, *, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_log_probs_are_those_of_the_published_weights_after_every_update(model_folder: Any, tied: bool) -> None:
    folder = model_folder(seed=1, tied=tied)
    model = reference_model(folder)

    async def scenario() -> None:
        worker = _worker(folder)
        for version in range(3):
            await load_version(worker, model, version)
            for summary, group in await _generate(worker, *(_request(version=version, seed=s) for s in range(4))):
                truth = sampled(reference_logprobs(model, group), group).detach().numpy()
                np.testing.assert_allclose(group.sampled_logprobs, truth, atol=1e-5)
                assert (group.token_versions == version).all()
                assert summary.oldest_version == version
                assert summary.response_lengths == tuple(np.diff(group.offsets))
            _disturb(model, seed=version)

    asyncio.run(scenario())


def test_a_request_waits_for_the_version_it_asks_for(model_folder: Any) -> None:
    folder = model_folder(seed=1)
    model = reference_model(folder)

    async def scenario() -> None:
        worker = _worker(folder)
        await load_version(worker, model, 0)
        early = asyncio.create_task(worker.generate(_request(version=1)))
        await _generate(worker, _request(version=0))
        assert not early.done()
        await load_version(worker, model, 1)
        _, group = await early
        assert (group.token_versions == 1).all()

    asyncio.run(scenario())


@pytest.mark.parametrize("in_flight", [True, False], ids=["in flight", "drained"])
def test_running_sequences_go_on_under_new_weights_or_are_let_finish_first(model_folder: Any, in_flight: bool) -> None:
    folder = model_folder(seed=1)

    async def scenario() -> None:
        worker = _worker(folder, update_in_flight=in_flight)
        model = reference_model(folder)
        await load_version(worker, model, 0)
        running = asyncio.create_task(worker.generate(_request(version=0, max_response_tokens=20)))
        version = 0
        while not running.done():  # publish again and again while it samples
            version += 1
            await load_version(worker, model, version)
        summary, group = await running
        assert summary.oldest_version == group.token_versions.min()
        versions = [np.unique(group.token_versions[a:b]) for a, b in itertools.pairwise(group.offsets)]
        if in_flight:
            assert version > 1
            assert max(map(len, versions)) > 1
            assert all((np.diff(group.token_versions[a:b]) >= 0).all() for a, b in itertools.pairwise(group.offsets))
        else:
            assert [len(of_sequence) for of_sequence in versions] == [1] * len(versions)

    asyncio.run(scenario())


def test_in_turn_groups_have_the_same_bits_in_any_order_of_arrival(model_folder: Any) -> None:
    folder = model_folder(seed=1)

    async def scenario() -> None:
        worker = _worker(folder)
        buffers = []
        requests = [_request(version=0, seed=seed, num_samples=2) for seed in range(12)]
        for number, order in enumerate((range(12), reversed(range(12)), [5, 0, 11, *range(1, 5), *range(6, 11)])):
            if number == 0:
                await load_version(worker, reference_model(folder), 0, turn=Turn(number=0))
            groups: dict[int, TrajectoryGroup] = {}

            async def ask(index: int, number: int = number, groups: Any = groups) -> None:
                turn = Turn(number=number + 1, index=index, size=len(requests))
                _, groups[index] = await worker.generate(requests[index], turn)

            tasks = []
            for index in order:
                tasks.append(asyncio.create_task(ask(index)))
                await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)
            buffers.append([groups[i] for i in range(12)])
        for later in buffers[1:]:
            for group, first in zip(later, buffers[0], strict=True):
                np.testing.assert_array_equal(group.response_ids, first.response_ids)
                np.testing.assert_array_equal(group.sampled_logprobs, first.sampled_logprobs)

    asyncio.run(scenario())


def test_the_same_request_gives_the_same_samples_and_each_sample_differs(model_folder: Any) -> None:
    async def scenario() -> None:
        folder = model_folder(seed=1)
        worker = _worker(folder)
        await load_version(worker, reference_model(folder), 0)
        (_, first), (_, again) = await _generate(worker, _request(version=0, seed=5), _request(version=0, seed=5))
        np.testing.assert_array_equal(first.response_ids, again.response_ids)
        responses = {tuple(first.response_ids[a:b]) for a, b in zip(first.offsets[:-1], first.offsets[1:], strict=True)}
        assert len(responses) > 1

    asyncio.run(scenario())


def test_log_probs_are_taken_at_the_rollout_temperature(model_folder: Any) -> None:
    folder = model_folder(seed=1)

    async def scenario() -> None:
        worker = _worker(folder, temperature=0.5)
        model = reference_model(folder)
        await load_version(worker, model, 0)
        _, group = (await _generate(worker, _request(version=0, temperature=0.5)))[0]
        truth = sampled((reference_logprobs(model, group) / 0.5).log_softmax(-1), group).detach().numpy()
        np.testing.assert_allclose(group.sampled_logprobs, truth, atol=1e-5)

    asyncio.run(scenario())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_students_own_support_is_its_top_k_at_every_position(model_folder: Any, temperature: float) -> None:
    folder, size = model_folder(seed=1), 25  # above vLLM's default limit of 20

    async def scenario() -> None:
        worker = _worker(folder, temperature=temperature)
        model = reference_model(folder)
        await load_version(worker, model, 0)
        request = _request(version=0, temperature=temperature, support_size=size, support_top_p=0.9)
        _, group = (await _generate(worker, request))[0]
        truth_NV = (reference_logprobs(model, group) / temperature).log_softmax(-1).detach()
        values_NK, ids_NK = truth_NV.topk(size)
        p_NK = values_NK.exp()
        inside_NK = (p_NK.cumsum(-1) - p_NK < 0.9).numpy()
        assert 1 < inside_NK.sum(1).mean() < size
        np.testing.assert_array_equal(group.support_ids, np.where(inside_NK, ids_NK.numpy(), -1))
        np.testing.assert_allclose(group.sampled_logprobs, sampled(truth_NV, group).numpy(), atol=1e-5)

    asyncio.run(scenario())


def test_with_a_corrected_nucleus_log_probs_are_renormalised_in_it(model_folder: Any) -> None:
    folder, top_p = model_folder(seed=1), 0.7

    async def scenario() -> None:
        worker = _worker(folder, top_p=top_p, correct_top_p=True)
        model = reference_model(folder)
        await load_version(worker, model, 0)
        _, group = (await _generate(worker, _request(version=0, top_p=top_p)))[0]
        truth_NV = reference_logprobs(model, group).detach()
        sorted_NV, order_NV = truth_NV.exp().sort(-1, descending=True)
        outside_NV = torch.zeros_like(truth_NV, dtype=torch.bool).scatter(
            1, order_NV, sorted_NV.cumsum(-1) - sorted_NV >= top_p
        )
        nucleus_NV = truth_NV.masked_fill(outside_NV, -torch.inf).log_softmax(-1)
        np.testing.assert_allclose(group.sampled_logprobs, sampled(nucleus_NV, group).numpy(), atol=1e-5)

    asyncio.run(scenario())


def test_more_seeded_prompts_than_one_prefill_holds_are_served(model_folder: Any) -> None:
    """vLLM's partial prefill rewinds a seeded generator, which torch's CPU generator refuses."""
    folder = model_folder(seed=1)

    async def scenario() -> None:
        worker = _worker(folder)
        await load_version(worker, reference_model(folder), 0)
        requests = [_request(version=0, seed=seed) for seed in range(64)]
        assert len(await _generate(worker, *requests)) == 64

    asyncio.run(scenario())
