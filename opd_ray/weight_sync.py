"""How new weights travel in a run: which way, and in which type."""

from opd_ray.config.schema import Config, Dtype
from opd_ray.config.weight_sync import WeightSync
from opd_ray.requests import follows_student
from opd_ray.routing import teachers_of


def chosen_sync(config: Config) -> WeightSync:
    """Return the way that `rollout.weight_sync` names or, with auto, the fastest there is.

    Raises ValueError for a way that the run's devices or its teachers rule out.
    """
    asked = config.rollout.weight_sync
    possible = _possible(config)
    if asked is WeightSync.auto:
        return possible[0]
    if asked not in possible:
        raise ValueError(
            f"rollout.weight_sync={asked.value} with {_reason(config)}: expected auto or"
            f" {' or '.join(sync.value for sync in possible)}"
        )
    return asked


def published_dtype(config: Config) -> Dtype:
    """Return the type in which weights travel: the rollout's where it is smaller than the learner's.

    An engine rounds what it loads to its own type, so nothing is lost; but an average of the student is taken from
    unrounded weights, and of an engine whose type is set in `engine_args` nothing is known here.
    """
    rollout = config.rollout
    trained = Dtype.float32 if config.student.lora.wanted else config.learner.dtype  # adapters are float32 always
    narrower = (trained, rollout.dtype) == (Dtype.float32, Dtype.bfloat16)
    rounded = narrower and "dtype" not in rollout.engine_args and not _is_averaged(config)
    return rollout.dtype if rounded else trained


def _possible(config: Config) -> list[WeightSync]:
    """Return the ways that work, the fastest first."""
    gpus = (config.rollout.gpus_per_worker, config.learner.gpus_per_rank)
    if min(gpus) == 0 or _is_averaged(config) or config.student.lora.wanted:
        return [WeightSync.object_store]
    native = [WeightSync.ipc] if sum(gpus) <= 1 else [WeightSync.nccl]  # NCCL refuses two ranks on one GPU
    return [*native, WeightSync.object_store]


def _reason(config: Config) -> str:
    devices = (
        f"rollout.gpus_per_worker={config.rollout.gpus_per_worker:g} and"
        f" learner.gpus_per_rank={config.learner.gpus_per_rank:g}"
    )
    adapters = " and student.lora.rank" if config.student.lora.wanted else ""  # vLLM's own ways know no adapters
    return f"{devices} and teacher.self.update=ema" if _is_averaged(config) else f"{devices}{adapters}"


def _is_averaged(config: Config) -> bool:
    """Return whether a teacher averages the student's weights, which it reads from the object store."""
    return any(follows_student(teacher) for teacher in teachers_of(config).by_name.values())
