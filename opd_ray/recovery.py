"""The budget of restarts: how often a run opens its pools anew after the loss of a worker, and how long it waits.

And the count of workers that were started anew in their place, without that.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from opd_ray.config.schema import Config
from opd_ray.config.services import FaultConfig
from opd_ray.protocol import Metrics
from opd_ray.routing import max_response_tokens


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


@dataclass(slots=True, kw_only=True)
class Rollbacks:
    """Remembers which updates are to take other prompts than before; a checkpoint written since knows by itself."""

    warn: Callable[[str, str], None]  # told words, and the kind of event
    _ranges: list[range] = field(default_factory=list)

    def add(self, step: int, last: int) -> None:
        """Note that the run went back to the checkpoint of `step`, from what update number `last` learns from."""
        self._ranges.append(range(step, last + 1))
        self.warn(f"going back: updates {step + 1} to {last + 1} take other prompts now", "rolled_back")

    def since(self, step: int) -> list[range]:
        """Return the updates that a run which goes on from a checkpoint must be told of."""
        return [steps for steps in self._ranges if steps.start >= step]

    def metrics(self) -> Metrics:
        """Return the count."""
        return {"fault/rollbacks": float(len(self._ranges))}


def with_half_micro_batches(config: Config, *, cause: Exception, warn: Callable[[str, str], None]) -> Config:
    """Return the configuration with micro-batches of half the tokens, or of the longest sequence: the same gradients.

    Raises the cause when they hold no more than that already.
    """
    limit = config.learner.max_tokens_per_micro_batch
    lower = max(limit // 2, config.data.max_prompt_tokens + max_response_tokens(config))
    if lower >= limit:
        raise cause
    warn(
        f"a learner rank had too little memory: learner.max_tokens_per_micro_batch={lower} now, {limit} before",
        "micro_batches_halved",
    )
    return replace(config, learner=replace(config.learner, max_tokens_per_micro_batch=lower))


@dataclass(slots=True, kw_only=True)
class Replacements:
    """Tells of workers that were started anew in their place while the run went on, and counts them."""

    warn: Callable[[str, str], None]  # told words, and the kind of event
    num_workers: int = 0

    def add(self, name: str) -> None:
        """Tell of a worker."""
        self.num_workers += 1
        self.warn(f"{name} was gone: it is started again in its place, and does again what it owed", "worker_restarted")

    def metrics(self) -> Metrics:
        """Return the count."""
        return {"fault/restarted_workers": float(self.num_workers)}
