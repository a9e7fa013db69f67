"""The budget of restarts: how often a run opens its pools anew after the loss of a worker, and how long it waits."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from opd_ray.config.services import FaultConfig


@dataclass(slots=True, kw_only=True)
class Restarts:
    """Counts restarts; those in a row without a new checkpoint are limited."""

    config: FaultConfig
    warn: Callable[[str, str], None]  # told words, and the kind of event
    sleep: Callable[[float], None] = time.sleep
    total: int = 0
    _in_a_row: int = 0
    _step: int = -1

    def after(self, loss: Exception, *, cause: Exception, step: int) -> None:
        """Tell of a loss and wait for the next try, from the checkpoint of `step`. Raises the cause if none is left."""
        self._in_a_row = 1 if step > self._step else self._in_a_row + 1
        self._step = step
        if self._in_a_row > self.config.max_restarts:
            raise cause
        self.total += 1
        delay_s = self.config.backoff_s * 2 ** (self._in_a_row - 1)
        start = f"from the checkpoint of update {step}" if step else "from the start, there is no checkpoint"
        self.warn(
            f"{loss}: all workers are started again in {delay_s:g} s, {start} (restart {self._in_a_row} of at most"
            f" {self.config.max_restarts} in a row)",
            "workers_restarted",
        )
        self.sleep(delay_s)
