"""Which prompts an update has: a function of the step alone, so that resuming needs no cursor."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.config.schema import BatchMode
from opd_ray.protocol import Prompt
from opd_ray.schedule import derive_seed

_TASK_STREAM, _REPLACEMENT_STREAM = 4, 5


class ShuffledPrompts:
    """Endless training batches: each epoch is a permutation of its own, drawn from (seed, epoch).

    first_in_order: the first epoch is the prompts as they are given.
    """

    def __init__(self, prompts: Sequence[Prompt], *, num_prompts: int, seed: int, first_in_order: bool = False) -> None:
        self.prompts = prompts
        self._num_prompts = num_prompts
        self._seed = seed
        self._first_in_order = first_in_order
        self._order = lru_cache(maxsize=2)(self._shuffled)  # a batch may lie in two epochs

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of update `step`: positions step*n to (step+1)*n of the endless stream."""
        size = len(self.prompts)
        positions = range(step * self._num_prompts, (step + 1) * self._num_prompts)
        orders = {epoch: self._order(epoch) for epoch in {p // size for p in positions}}
        return [self.prompts[orders[p // size][p % size]] for p in positions]

    def replacement(self, step: int, *, position: int, attempt: int) -> Prompt:
        """Return another prompt for a position of update `step`: of its task, and not of that update if there is one.

        A function of (seed, step, position, attempt); the attempts at a position are different prompts.
        """
        return _another(self.prompts, self.batch(step), position=position, seed=self._seed, step=step, attempt=attempt)

    def _shuffled(self, epoch: int) -> Any:
        if self._first_in_order and epoch == 0:
            return np.arange(len(self.prompts))
        return np.random.default_rng(derive_seed(self._seed, epoch)).permutation(len(self.prompts))


class TaskPrompts:
    """Endless training batches of several tasks: of each task in its share, or of one task after the other."""

    def __init__(
        self, prompts: Sequence[Prompt], *, num_prompts: int, shares: Mapping[str, float], mode: BatchMode, seed: int
    ) -> None:
        self._tasks = sorted({prompt.task for prompt in prompts})
        self._shares = np.array([shares[task] for task in self._tasks])
        counts = dict.fromkeys(self._tasks, num_prompts)
        if mode is BatchMode.mixed:
            counts = mixed_counts(num_prompts, {task: shares[task] for task in self._tasks})
        self._mode = mode
        self._seed = seed
        self._streams = {
            task: ShuffledPrompts(
                [p for p in prompts if p.task == task],
                num_prompts=counts[task],
                seed=seed if len(self._tasks) == 1 else derive_seed(seed, _TASK_STREAM, index),
            )
            for index, task in enumerate(self._tasks)
        }

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of update `step`."""
        if self._mode is BatchMode.mixed:
            return [prompt for stream in self._streams.values() for prompt in stream.batch(step)]
        # After n updates task i has had its share of n, to the nearest whole: the update is of the task that it adds.
        before, after = (in_shares(n, self._shares) for n in (step, step + 1))
        index = int(np.argmax(np.subtract(after, before)))
        return self._streams[self._tasks[index]].batch(before[index])

    def replacement(self, step: int, *, position: int, attempt: int) -> Prompt:
        """Return another prompt for a position of update `step`: of its task, and not of that update if there is one.

        A function of (seed, step, position, attempt); the attempts at a position are different prompts.
        """
        batch = self.batch(step)
        prompts = self._streams[batch[position].task].prompts
        return _another(prompts, batch, position=position, seed=self._seed, step=step, attempt=attempt)


def _another(
    prompts: Sequence[Prompt], batch: Sequence[Prompt], *, position: int, seed: int, step: int, attempt: int
) -> Prompt:
    task, taken = batch[position].task, {prompt.index for prompt in batch}
    of_task = [prompt for prompt in prompts if prompt.task == task]
    others = [prompt for prompt in of_task if prompt.index not in taken] or of_task
    return others[(derive_seed(seed, _REPLACEMENT_STREAM, step, position) + attempt) % len(others)]


def mixed_counts(num_prompts: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return how many prompts of an update are of each task."""
    return dict(zip(shares, in_shares(num_prompts, np.array(list(shares.values()))), strict=True))


def in_shares(total: int, shares: npt.NDArray[np.float64]) -> list[int]:
    """Cut a total into whole parts in proportion to the shares; each of them grows with the total, none ever falls.

    Webster's method: the next one always goes to the part with the largest share / (part + 1/2). The rounded shares of
    a total that is smaller by half the number of parts are certain, so that only a few are left to deal out.
    """
    certain = max(0.0, total - len(shares) / 2) * shares / shares.sum()
    parts = np.ceil(certain - 0.5).clip(min=0).astype(np.int64)
    for _ in range(total - int(parts.sum())):
        parts[np.argmax(shares / (parts + 0.5))] += 1
    return [int(part) for part in parts]
