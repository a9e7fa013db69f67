"""Weights by vLLM's NCCL engine: rank 0 broadcasts packed buckets from its GPU to those of all rollout workers."""

from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from workers.sync.native import Meeting


def trainer_info(meeting: Meeting, *, rank: int, ranks_per_worker: int) -> NCCLTrainerInitInfo:
    """Return vLLM's description of the group: rank 0 of the learner, then every process of every worker."""
    return NCCLTrainerInitInfo(
        master_address=meeting.address,
        master_port=meeting.port,
        world_size=1 + meeting.num_workers * ranks_per_worker,
        packed=True,
        rank=rank,
    )
