"""Which publisher and which engine of vLLM serve a way of new weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from opd_ray.config.schema import Config, Dtype
from opd_ray.config.weight_sync import WeightSync
from opd_ray.weight_sync import chosen_sync, published_dtype
from workers.sync.backend import Publisher
from workers.sync.object_store import ObjectStorePublisher
from workers.sync.source import StudentWeights
from workers.weights import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPlan:
    """How the learner's ranks publish."""

    way: WeightSync  # never auto
    dtype: Dtype
    ranks_per_worker: int  # processes of a rollout worker's engine

    @staticmethod
    def of(config: Config) -> "SyncPlan":
        """Return the plan of a run."""
        engine_args = config.rollout.engine_args
        return SyncPlan(
            way=chosen_sync(config),
            dtype=published_dtype(config),
            ranks_per_worker=engine_args.get("tensor_parallel_size", 1) * engine_args.get("pipeline_parallel_size", 1),
        )

    @property
    def sends(self) -> bool:
        """Whether the ranks write into the workers themselves."""
        return self.way is not WeightSync.object_store


def _object_store(weights: StudentWeights, *, plan: SyncPlan, rank: int, num_updates: Callable[[], int]) -> Publisher:
    del plan, num_updates  # a publication holds its own bytes
    return ObjectStorePublisher(weights, rank=rank)


def _nccl(weights: StudentWeights, *, plan: SyncPlan, rank: int, num_updates: Callable[[], int]) -> Publisher:
    from workers.sync.native import NativePublisher
    from workers.sync.nccl import trainer_info

    describe = partial(trainer_info, rank=rank, ranks_per_worker=plan.ranks_per_worker)
    return NativePublisher(weights, rank=rank, describe=describe, num_updates=num_updates)


def _ipc(weights: StudentWeights, *, plan: SyncPlan, rank: int, num_updates: Callable[[], int]) -> Publisher:
    from workers.sync.ipc import trainer_info
    from workers.sync.native import NativePublisher

    del plan  # no group: handles name their GPU
    return NativePublisher(weights, rank=rank, describe=partial(trainer_info, rank=rank), num_updates=num_updates)


PUBLISHERS: dict[WeightSync, Callable[..., Publisher]] = {
    WeightSync.object_store: _object_store,
    WeightSync.nccl: _nccl,
    WeightSync.ipc: _ipc,
}
ENGINES: dict[WeightSync, str] = {  # vLLM's name of the receiving engine
    WeightSync.auto: "object_store",  # of a worker without a learner beside it
    WeightSync.object_store: "object_store",  # ours: `workers.object_store_engine`
    WeightSync.nccl: "nccl",
    WeightSync.ipc: "ipc",
}


def open_publisher(
    model: Any,
    *,
    plan: SyncPlan,
    rank: int,
    partitioned: bool,
    num_updates: Callable[[], int],
    lora: LoraSpec | None = None,
) -> Publisher:
    """Return a rank's side of the plan.

    partitioned: parameters lie in parts on the ranks (ZeRO-3). lora: of the adapters that alone are published.
    """
    weights = StudentWeights(
        model,
        dtype=getattr(torch, plan.dtype.value),
        partitioned=partitioned,
        reads=rank == 0 or plan.way is WeightSync.ipc,  # every rank shares its memory with its neighbours
        lora=lora,
    )
    return PUBLISHERS[plan.way](weights, plan=plan, rank=rank, num_updates=num_updates)
