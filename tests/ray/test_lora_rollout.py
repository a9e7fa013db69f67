"""Adapters in the rollout worker on a real vLLM engine, as a plain object without Ray."""

import asyncio
from itertools import count, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import make_request, reference_logprobs, reference_model, sampled

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import Dtype, RolloutConfig
from opd_ray.config.student import LoraConfig
from opd_ray.data.lora import adapter_parameters, add_adapters
from opd_ray.protocol import GenerateRequest, TrajectoryGroup
from workers.rollout.worker import RolloutWorker, logprob_args
from workers.weights import Buffers, LoraSpec, WeightManifest, published

pytestmark = pytest.mark.ray

_ENGINE_ARGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}


def _worker(folder: str, lora: LoraConfig) -> RolloutWorker:
    config = RolloutConfig(dtype=Dtype.float32, engine_args=_ENGINE_ARGS)
    objective = ObjectiveConfig(kind=ObjectiveKind.sampled)
    return RolloutWorker(
        model_path=folder,
        config=config,
        max_model_tokens=128,
        logprob_args=logprob_args(config, objective),
        lora=lora,
    )


def _request(*, version: int, seed: int = 0, **sampling: Any) -> GenerateRequest:
    return make_request(1, 2, 3, 4, 5, version=version, seed=seed, num_samples=4, **sampling)


def _set_adapters(model: torch.nn.Module, *, version: int) -> None:
    """Give every version adapters of its own, far from 0; those of version 0 are 0."""
    torch.manual_seed(version)
    for name, parameter in adapter_parameters(model):
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1 * (version > 0)


def _publication(model: torch.nn.Module, lora: LoraConfig, *, version: int) -> tuple[WeightManifest, Buffers]:
    spec = LoraSpec(rank=lora.rank, alpha=lora.alpha)
    manifest, buffers = published(adapter_parameters(model), version=version, lora=spec)
    for buffer in buffers:
        buffer.flags.writeable = False  # as Ray hands it out
    return manifest, buffers


async def _load(worker: RolloutWorker, manifest: WeightManifest, buffers: Buffers) -> None:
    await worker.prepare(manifest, buffers)
    await worker.commit(manifest.version)


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(rank=3, alpha=5.0), LoraConfig(rank=8, alpha=8.0, target_modules=["q_proj", "down_proj"])],
    ids=["all linear layers", "two modules of packed layers"],
)
def test_each_published_adapter_is_what_is_sampled_from_and_version_0_is_the_base_model(
    model_folder: Any, lora: LoraConfig
) -> None:
    folder = model_folder(seed=1, tied=True)
    base, model = reference_model(folder), reference_model(folder)
    add_adapters(model, lora)

    async def scenario() -> None:
        worker = _worker(folder, lora)
        for version in range(3):
            _set_adapters(model, version=version)
            manifest, buffers = _publication(model, lora, version=version)
            before = [buffer.copy() for buffer in buffers]
            await _load(worker, manifest, buffers)
            for buffer, earlier in zip(buffers, before, strict=True):
                np.testing.assert_array_equal(buffer, earlier)
            _, group = await worker.generate(_request(version=version, seed=version))
            truth_N = sampled(reference_logprobs(model, group), group).detach().numpy()
            base_N = sampled(reference_logprobs(base, group), group).detach().numpy()
            np.testing.assert_allclose(group.sampled_logprobs, truth_N, atol=1e-5)
            if version == 0:
                np.testing.assert_allclose(group.sampled_logprobs, base_N, atol=1e-5)
            else:
                assert np.abs(base_N - truth_N).max() > 0.1
            assert (group.token_versions == version).all()

    asyncio.run(scenario())


def test_running_sequences_go_on_under_each_new_adapter_and_every_token_names_the_one_it_was_sampled_under(
    model_folder: Any,
) -> None:
    folder, lora = model_folder(seed=1), LoraConfig(rank=4)
    model = reference_model(folder)
    add_adapters(model, lora)

    async def scenario() -> TrajectoryGroup:
        worker = _worker(folder, lora)
        _set_adapters(model, version=0)
        await _load(worker, *_publication(model, lora, version=0))
        running = asyncio.create_task(worker.generate(_request(version=0, max_response_tokens=96)))
        for version in count(1):
            if running.done():
                break
            _set_adapters(model, version=version)
            await _load(worker, *_publication(model, lora, version=version))
        return (await running)[1]

    group = asyncio.run(scenario())
    spans = 0
    for start, end in pairwise(group.offsets):
        versions_N = group.token_versions[start:end]
        assert (np.diff(versions_N) >= 0).all()
        spans += len(set(versions_N)) > 1
        truth_N = _logprobs_across_versions(model, group, start=start, end=end)
        np.testing.assert_allclose(group.sampled_logprobs[start:end], truth_N, atol=1e-4)
    assert spans > 0


@torch.no_grad()
def _logprobs_across_versions(
    model: torch.nn.Module, group: TrajectoryGroup, *, start: int, end: int
) -> npt.NDArray[np.float32]:
    """Sample by sample: keys and values of a token stay those of the version that read it."""
    cache, unread, rows = None, group.prompt_ids.tolist(), []
    for token, version in zip(group.response_ids[start:end], group.token_versions[start:end], strict=True):
        _set_adapters(model, version=int(version))
        output = model(torch.tensor([unread]), past_key_values=cache, use_cache=True)
        cache, unread = output.past_key_values, [int(token)]
        rows.append(output.logits[0, -1].log_softmax(-1)[int(token)])
    return torch.stack(rows).numpy()
