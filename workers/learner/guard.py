"""A step whose gradients are not finite, or spike, changes nothing: no weights, no optimizer state, no schedule.

DeepSpeed leaves such a step out on all ranks alike wherever its own optimizers hold the gradients: they look at the
norm over all ranks. At ZeRO-0 in float32 it steps whatever they are; there the optimizer is torch's.
"""

import math
import sys
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

_RECENT_STEPS = 32
_LEAST_STEPS = 8  # before there is anything to compare with
_STATE = "recent_norms"
_ASKED = "is_invalid_grad_norm"  # what each of DeepSpeed's optimizers calls with the norm, by its own module's name


class StepGuard:
    """Takes an engine's steps. A spike is a norm of more than factor times the median of the last 32 steps taken.

    As OLMo-core's SkipStepAdamW does it by mean and deviation; a spike that was taken moves a median less.
    """

    def __init__(self, engine: Any, *, spike_factor: float) -> None:
        """spike_factor: 0 leaves out only what is not finite. Raises ValueError for an optimizer that never asks."""
        self.norm = math.inf  # of the last step's gradients over all ranks, before clipping
        self.spiked = False  # the last step
        self._engine = engine
        self._factor = spike_factor
        self._recent = deque[float](maxlen=_RECENT_STEPS)
        if hasattr(engine.optimizer, "overflow"):
            module = sys.modules[type(engine.optimizer).__module__]
            if not hasattr(module, _ASKED):
                name = type(engine.optimizer).__name__
                raise ValueError(f"learner.engine_args: {name} cannot leave steps out; expected another optimizer")
            setattr(module, _ASKED, self._is_refused)
        else:
            self._guard_torch(engine)

    def step(self) -> None:
        """Take a step, or leave it out."""
        self.norm, self.spiked = math.inf, False
        self._engine.step()

    @property
    def left_out(self) -> bool:
        """Whether the last step was left out."""
        return bool(self._engine.optimizer.overflow)

    @property
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {_STATE: list(self._recent)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._recent = deque(state.get(_STATE, ()), maxlen=_RECENT_STEPS)

    def _is_refused(self, norm: Any) -> bool:
        self.norm = float(norm)
        if not math.isfinite(self.norm) or self.norm < 0:  # DeepSpeed's sign of one that is not finite
            self.norm = math.inf
            return True
        if self._factor > 0 and len(self._recent) >= _LEAST_STEPS:
            self.spiked = self.norm > self._factor * median(self._recent)
        if not self.spiked:
            self._recent.append(self.norm)
        return self.spiked

    def _guard_torch(self, engine: Any) -> None:
        """Do what DeepSpeed's optimizers do. The gradients are averaged over ranks by now, and so the same on each."""
        optimizer, step, clipped = engine.optimizer, engine.optimizer.step, list[torch.Tensor]()

        def clip() -> None:
            clipped[:] = [torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())]

        def guarded(*args: Any, **kwargs: Any) -> Any:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            optimizer.overflow = self._is_refused(
                clipped.pop() if clipped else torch.nn.utils.get_total_norm(gradients)
            )
            return None if optimizer.overflow else step(*args, **kwargs)

        optimizer.overflow = False
        optimizer.step = guarded
        engine.clip_fp32_gradients = clip
