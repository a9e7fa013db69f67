"""The configuration of how new weights reach the rollout workers."""

from enum import StrEnum


class WeightSync(StrEnum):
    """The way of new weights from the learner to the rollout workers."""

    auto = "auto"  # by where the two are: see `opd_ray.weight_sync.chosen_sync`
    object_store = "object_store"  # through Ray's object store: anywhere
    nccl = "nccl"  # vLLM's broadcast from rank 0's GPU to those of the workers
    ipc = "ipc"  # vLLM's CUDA IPC: the workers read the ranks' memory on the GPU they share
