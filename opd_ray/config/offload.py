"""What of the student DeepSpeed is told to keep off the learner's devices."""

from enum import StrEnum
from typing import Any

from opd_ray.config.schema import Config, LearnerConfig

_KEY = "learner.engine_args.zero_optimization"


class Offload(StrEnum):
    """DeepSpeed's blocks: `learner.engine_args.zero_optimization.offload_<name>.device`."""

    optimizer = "optimizer"
    param = "param"


_FIRST_STAGE = {Offload.optimizer: 1, Offload.param: 3}  # ZeRO stages that have it


def offloads(learner: LearnerConfig, what: Offload) -> bool:
    """Return whether this is moved off the device; CPU ranks have it there anyway."""
    block = _zero(learner).get(_block(what))
    return isinstance(block, dict) and str(block.get("device", "none")) != "none"


def check_zero_options(config: Config) -> None:
    """Raise ValueError for options of ZeRO that contradict `learner.zero_stage`, or that DeepSpeed does not know."""
    zero, stage = _zero(config.learner), config.learner.zero_stage
    if "stage" in zero:
        raise ValueError(f"{_KEY}.stage={zero['stage']}: expected learner.zero_stage, which more than DeepSpeed reads")
    for what, first_stage in _FIRST_STAGE.items():
        given = zero.get(_block(what))
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{_KEY}.{_block(what)}={given}: expected {_KEY}.{_block(what)}.device={given}")
        if offloads(config.learner, what) and stage < first_stage:
            raise ValueError(
                f"{_KEY}.{_block(what)} with learner.zero_stage={stage}: expected learner.zero_stage"
                f" {' or '.join(map(str, range(first_stage, 4)))}"
            )


def _zero(learner: LearnerConfig) -> dict[str, Any]:
    return learner.engine_args.get("zero_optimization") or {}


def _block(what: Offload) -> str:
    return f"offload_{what.value}"
