"""A step with gradients that are not finite changes nothing: neither weights, nor the optimizer, nor the schedule.

DeepSpeed leaves such a step out on all ranks alike wherever its own optimizers hold the gradients: they look at the
norm over all ranks. At ZeRO-0 in float32 it steps whatever they are; there the optimizer is torch's.
"""

from typing import Any

import torch


def guard_steps(engine: Any) -> None:
    """Have an engine leave out every step whose gradients are not finite."""
    if hasattr(engine.optimizer, "overflow"):
        return
    optimizer, step = engine.optimizer, engine.optimizer.step

    def guarded(*args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Averaged over ranks by now, and so the same on each.
        optimizer.overflow = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        return None if optimizer.overflow else step(*args, **kwargs)

    optimizer.overflow = False
    optimizer.step = guarded


def is_left_out(engine: Any) -> bool:
    """Whether the engine's last step was left out."""
    return bool(engine.optimizer.overflow)
