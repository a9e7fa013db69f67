"""The contract of weight sync through Ray's object store, on the real stack; what else one worker must keep."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    compose_config,
    load_version,
    make_request,
    reference_logprobs,
    reference_model,
    sampled,
)
from sync_contract import (
    check_a_worker_that_missed_a_version_waits_for_it,
    check_contract,
    check_workers_read_the_object_store_in_place,
    open_stack,
)

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import Dtype, RolloutConfig
from opd_ray.config.weight_sync import WeightSync
from opd_ray.protocol import TrajectoryGroup
from workers import connected
from workers.rollout.worker import RolloutWorker, logprob_args
from workers.weights import published

pytestmark = pytest.mark.ray

_SHORT_S = 1.0


@pytest.mark.parametrize(
    ("tied", "zero_stage"),
    [(False, 3), pytest.param(True, 2, marks=pytest.mark.slow)],
    ids=["untied head, ZeRO-3", "tied head"],
)
def test_the_object_store_keeps_the_contract(
    overrides: Callable[..., list[str]], tmp_path: Path, model_folder: Any, tied: bool, zero_stage: int
) -> None:
    config = compose_config(
        overrides(
            f"student.path={model_folder(seed=1, tied=tied)}",
            "rollout.num_workers=2",
            "learner.num_ranks=1",
            f"learner.zero_stage={zero_stage}",
        )
    )
    with connected(config), open_stack(config, tmp_path, local=True) as stack:
        check_contract(stack)
        check_a_worker_that_missed_a_version_waits_for_it(stack)
        check_workers_read_the_object_store_in_place(stack)


def _worker(folder: str, *, dtype: Dtype, weight_sync: WeightSync = WeightSync.object_store) -> RolloutWorker:
    engine_args = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
    config = RolloutConfig(dtype=dtype, engine_args=engine_args, weight_sync=weight_sync)
    arguments = logprob_args(config, ObjectiveConfig(kind=ObjectiveKind.sampled))
    return RolloutWorker(model_path=folder, config=config, max_model_tokens=64, logprob_args=arguments)


async def _sample(worker: RolloutWorker, *, version: int) -> TrajectoryGroup:
    request = make_request(1, 2, 3, version=version)
    _, group = await worker.generate(request)
    return group


def _disturb(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def _gap(model: torch.nn.Module, group: TrajectoryGroup) -> float:
    truth = sampled(reference_logprobs(model, group), group).detach().numpy()
    return float(np.abs(group.sampled_logprobs - truth).max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_weights_rounded_before_they_travel_are_those_that_the_engine_would_round_itself(
    model_folder: Any, tied: bool
) -> None:
    folder = model_folder(seed=1, tied=tied)
    model = reference_model(folder)
    _disturb(model)

    async def scenario() -> None:
        worker = _worker(folder, dtype=Dtype.bfloat16)
        groups = []
        for version, dtype in enumerate((torch.float32, torch.bfloat16)):
            rounded = [(name, parameter.detach().to(dtype)) for name, parameter in model.named_parameters()]
            await worker.prepare(*published(rounded, version=version))
            await worker.commit(version)
            groups.append(await _sample(worker, version=version))
        np.testing.assert_array_equal(groups[0].response_ids, groups[1].response_ids)
        np.testing.assert_array_equal(groups[0].sampled_logprobs, groups[1].sampled_logprobs)
        assert _gap(model, groups[1]) < 0.1

    asyncio.run(scenario())


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_a_load_that_fails_between_two_tensors_leaves_nothing_behind_in_the_next(model_folder: Any, tied: bool) -> None:
    """A layer whose first half came from the failed load must not take its second half from the next."""
    folder = model_folder(seed=1, tied=tied)
    model = reference_model(folder)

    async def scenario() -> None:
        worker = _worker(folder, dtype=Dtype.float32)
        manifest, buffers = published(model.named_parameters(), version=0)
        middle = next(i for i, entry in enumerate(manifest.entries) if "up_proj" in entry.name)  # after gate_proj
        cut = (*buffers[:middle], buffers[middle][:-1], *buffers[middle + 1 :])
        zeros = tuple(np.zeros_like(buffer) for buffer in cut)
        await worker.prepare(manifest, buffers)
        with pytest.raises(ValueError, match=r"up_proj.weight holds"):
            await worker.commit(0, {"manifest": manifest, "buffers": zeros})
        assert await worker.held_version() == -1
        waiting = asyncio.create_task(_sample(worker, version=-1))
        done, _ = await asyncio.wait([waiting], timeout=_SHORT_S)
        assert not done
        _disturb(model)
        await load_version(worker, model, 1)
        assert _gap(model, await waiting) < 1e-4
        assert _gap(model, await _sample(worker, version=1)) < 1e-4

    asyncio.run(scenario())


def test_a_worker_of_a_native_way_that_missed_a_version_takes_it_from_the_object_store(model_folder: Any) -> None:
    folder = model_folder(seed=1)
    model = reference_model(folder)
    _disturb(model)

    async def scenario() -> None:
        worker = _worker(folder, dtype=Dtype.float32, weight_sync=WeightSync.nccl)
        await load_version(worker, model, 4)
        assert _gap(model, await _sample(worker, version=4)) < 1e-4

    asyncio.run(scenario())


def test_a_publication_of_another_model_is_refused_before_anything_changes(model_folder: Any) -> None:
    folder = model_folder(seed=1)
    model, wider = reference_model(folder), reference_model(model_folder(seed=1, hidden_size=128))

    async def scenario() -> None:
        worker = _worker(folder, dtype=Dtype.float32)
        await load_version(worker, model, 0)
        with pytest.raises(ValueError, match=r"version 1: model.embed_tokens.weight has shape \(32, 128\)"):
            await worker.prepare(*published(wider.named_parameters(), version=1))
        assert await worker.held_version() == 0
        assert _gap(model, await _sample(worker, version=0)) < 1e-4

    asyncio.run(scenario())
