"""What training the student takes at the least: memory of a rank's device, bytes of a checkpoint and of the export."""

from dataclasses import dataclass

from opd_ray.config.schema import Dtype, LearnerConfig

_TRAINED_BYTES = 16  # of a parameter, its weight included: gradient and two moments, a float32 copy beside bfloat16
_CHECKPOINT_BYTES = 16  # of a parameter: the model's and the optimizer's copy and two moments, in float32
_ADAPTER_BYTES = 4  # of a parameter: adapters are float32 always
BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}
_STATE_IN_PARTS, _WEIGHTS_IN_PARTS = 1, 3  # ZeRO stages from which a rank holds its part alone


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSize:
    """How many values the student has and how many are trained."""

    num_parameters: int  # without adapters
    num_adapters: int | None = None  # values; None: all parameters are trained

    @property
    def num_trained(self) -> int:
        """Return how many values have a gradient."""
        return self.num_parameters if self.num_adapters is None else self.num_adapters


def training_bytes(learner: LearnerConfig, size: TrainedSize) -> int:
    """Return what a rank holds on its device: weights, gradients and optimizer state.

    What is offloaded from a GPU lies in the machine's memory and is not counted; gradients pass through the GPU.
    """
    of_trained = BYTES[learner.dtype] if size.num_adapters is None else _ADAPTER_BYTES
    weights = export_bytes(learner, size)
    state = size.num_trained * (of_trained if _offloads(learner, "optimizer") else _TRAINED_BYTES - of_trained)
    if _offloads(learner, "param"):
        weights = 0
    parts_of_weights = learner.num_ranks if learner.zero_stage >= _WEIGHTS_IN_PARTS else 1
    parts_of_state = learner.num_ranks if learner.zero_stage >= _STATE_IN_PARTS else 1
    return weights // parts_of_weights + state // parts_of_state


def checkpoint_bytes(size: TrainedSize) -> int:
    """Return the size of one checkpoint: of what is trained alone."""
    return size.num_trained * _CHECKPOINT_BYTES


def export_bytes(learner: LearnerConfig, size: TrainedSize) -> int:
    """Return the size of the export: the whole student, and adapters by themselves."""
    return size.num_parameters * BYTES[learner.dtype] + (size.num_adapters or 0) * _ADAPTER_BYTES


def _offloads(learner: LearnerConfig, what: str) -> bool:
    """Return whether DeepSpeed is told to move this off a GPU."""
    block = learner.engine_args.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return learner.gpus_per_rank > 0 and block.get("device", "none") != "none"
