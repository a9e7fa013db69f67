"""What vLLM's own engines have in common here: the trainer that drives them, and whom it calls.

Imported by the learner ranks of a run that uses one; it imports vLLM.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from workers.sync.backend import Publication
from workers.sync.object_store import ObjectStorePublisher
from workers.sync.source import StudentWeights
from workers.weights import plan_manifest

_RANK_OFFSET = "rank_offset"  # in what a worker is told to join a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where learner and rollout workers meet: at a free port of rank 0."""

    address: str
    port: int
    num_workers: int


class StudentSource(WeightSource):
    """vLLM's view of the student's weights."""

    def __init__(self, weights: StudentWeights) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Return what iteration yields, without gathering anything."""
        return [ParamMeta(name=name, dtype=dtype, shape=shape) for name, dtype, shape in self._weights.shapes()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, whole tensor); all ranks iterate in lockstep."""
        return iter(self._weights)


class WorkersClient:
    """vLLM's `VLLMWeightSyncClient` on the rollout workers' actors.

    A worker starts, receives and finishes an update in one call, between two steps of its engine: a step in between
    would meet layers without weights.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self.version = -1  # that is sent next
        self._workers = list(workers)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every worker join; blocks until all have."""
        told = joining_infos(init_info, num_workers=len(self._workers))
        ray.get([worker.join.remote(info) for worker, info in zip(self._workers, told, strict=True)])

    def start_weight_update(self) -> None:
        """Part of the worker's `commit`."""

    def update_weights(self, update_info: Any) -> None:
        """Have every worker commit the version; blocks until all have."""
        ray.get([worker.commit.remote(self.version, update_info) for worker in self._workers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Part of the worker's `commit`."""


def joining_infos(init_info: dict[str, Any], *, num_workers: int) -> list[dict[str, Any]]:
    """Return what each worker is told: in a group, with ranks of its own.

    vLLM numbers the processes of one engine; of several engines each would call itself the first.
    """
    if _RANK_OFFSET not in init_info:
        return [init_info] * num_workers
    first = init_info[_RANK_OFFSET]
    ranks_per_worker = (init_info["world_size"] - first) // num_workers
    return [{**init_info, _RANK_OFFSET: first + index * ranks_per_worker} for index in range(num_workers)]


class NativePublisher:
    """`Publisher` on a trainer of vLLM's; what `send` brings is the weights as they were published."""

    def __init__(
        self,
        weights: StudentWeights,
        *,
        rank: int,
        describe: Callable[[Meeting], TrainerInitInfo],
        num_updates: Callable[[], int],
    ) -> None:
        """num_updates: how many updates the student has had."""
        self._weights = weights
        self._rank = rank
        self._describe = describe
        self._num_updates = num_updates
        self._published: tuple[int, int] | None = None  # version, number of updates

    def connect(self, workers: Sequence[Any], *, address: str, port: int) -> None:
        """Build vLLM's trainer; on rank 0 this blocks until every worker has joined."""
        self._client = WorkersClient(workers)
        self._trainer = WeightTransferTrainerFactory.trainer_init(
            self._describe(Meeting(address=address, port=port, num_workers=len(workers))),
            client=self._client,
            source=StudentSource(self._weights),
        )

    def publish(self, version: int) -> Publication:
        """Return the manifest alone, on rank 0."""
        self._published = version, self._num_updates()
        return (plan_manifest(self._weights.shapes(), version=version), None) if self._rank == 0 else (None, None)

    def send(self, version: int) -> None:
        """Write the published weights into all workers. Raises RuntimeError when an update has changed them since."""
        self._check_unchanged(version)
        self._client.version = version
        self._trainer.send_weights()

    def store(self, version: int) -> Publication:
        """Return the published weights with their bytes. Raises RuntimeError when an update has changed them since."""
        self._check_unchanged(version)
        return ObjectStorePublisher(self._weights, rank=self._rank).publish(version)

    def _check_unchanged(self, version: int) -> None:
        if self._published != (version, self._num_updates()):
            raise RuntimeError(
                f"version {version} is gone: the last is {self._published} (version, updates before it), and there have"
                f" been {self._num_updates()} updates"
            )
