"""Weights by vLLM's CUDA IPC engine: workers read the memory of the learner rank on the GPU that they share with it."""

from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from workers.sync.native import Meeting


def trainer_info(meeting: Meeting, *, rank: int) -> IPCTrainerInitInfo:
    """Return vLLM's description of the transfer, which needs no meeting.

    Not packed: one update holds the handles of all tensors, of the parameters themselves where they are neither
    rounded nor gathered, so that no engine step falls between two parts of a version.
    """
    del meeting
    return IPCTrainerInitInfo(packed=False, rank=rank)
