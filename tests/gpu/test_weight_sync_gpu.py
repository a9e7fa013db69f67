"""The contract of weight sync by vLLM's own engines: CUDA IPC on one shared GPU, NCCL across three."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import compose_config
from sync_contract import check_contract, open_stack

from opd_ray.config.schema import Config
from opd_ray.config.weight_sync import WeightSync
from opd_ray.weight_sync import chosen_sync
from workers import connected

pytestmark = pytest.mark.gpu

_TWO_WORKERS = [
    "rollout.num_workers=2",
    "+rollout.engine_args.gpu_memory_utilization=0.2",
    "rollout.dtype=float32",
    "learner.num_ranks=1",
    "learner.dtype=float32",
]


def _check(config: Config, folder: Path, *, expected: WeightSync) -> None:
    assert chosen_sync(config) is expected
    with connected(config), open_stack(config, folder, local=True) as stack:
        check_contract(stack)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_cuda_ipc_keeps_the_contract(overrides: Callable[..., list[str]], tmp_path: Path, zero_stage: int) -> None:
    shares = ["rollout.gpus_per_worker=0.3", "learner.gpus_per_rank=0.3", f"learner.zero_stage={zero_stage}"]
    _check(compose_config(overrides(*_TWO_WORKERS, *shares)), tmp_path, expected=WeightSync.ipc)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_nccl_keeps_the_contract(overrides: Callable[..., list[str]], tmp_path: Path, zero_stage: int) -> None:
    shares = ["rollout.gpus_per_worker=1", "learner.gpus_per_rank=1", f"learner.zero_stage={zero_stage}"]
    _check(compose_config(overrides(*_TWO_WORKERS, *shares)), tmp_path, expected=WeightSync.nccl)
