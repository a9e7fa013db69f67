"""The norm of each task's gradient, without a copy of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from opd_ray.arrays import Float32

WIDTH = 4093  # prime, so that no column of a weight falls into one bucket throughout
_BLOCK_ROWS = 256


class TaskGradients:
    """Adds up each task's gradients in a projection: hooks see a micro-batch's own before it is added to the others.

    So it is at every ZeRO stage, where the sum itself is spread over ranks. A projection is linear: micro-batches and
    ranks add up. See `norms` for what it keeps.
    """

    def __init__(self, module: nn.Module) -> None:
        self._task = ""
        self._sums: dict[str, Tensor] = {}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for seed, parameter in enumerate(trained):
            parameter.register_hook(lambda gradient, seed=seed: self._add(gradient, seed=seed))

    def begin(self, task: str) -> None:
        """Say whose the next gradients are; "": nobody's."""
        self._task = task

    def take(self) -> dict[str, Float32]:
        """Return the projection [WIDTH] of each task's gradient since the last call."""
        sums, self._sums = self._sums, {}
        return {task: total.cpu().numpy() for task, total in sums.items()}

    def _add(self, gradient: Tensor, *, seed: int) -> None:
        if not self._task:
            return
        total = self._sums.setdefault(self._task, torch.zeros(WIDTH, device=gradient.device))
        total += projected(gradient.detach(), seed=seed)


def projected(gradient: Tensor, *, seed: int) -> Tensor:
    """Return the sums [WIDTH] of every WIDTH-th number under random signs; the seed tells the parameter."""
    generator = torch.Generator(gradient.device).manual_seed(seed)
    total = torch.zeros(WIDTH, device=gradient.device)
    for block in gradient.flatten().split(WIDTH * _BLOCK_ROWS):
        signs = torch.randint(2, block.shape, generator=generator, device=block.device, dtype=torch.int8)
        signed = block.float() * (2 * signs - 1)
        total += nn.functional.pad(signed, (0, -len(signed) % WIDTH)).view(-1, WIDTH).sum(0)
    return total


def norms(ranks: Sequence[Mapping[str, Float32]]) -> dict[str, float]:
    """Return the norm of each task's part of the gradient, the mean over ranks.

    The square of the projection's norm has the square of the gradient's as its mean, at a standard deviation of
    sqrt(2 / WIDTH), 2.2 %, of it (Alon, Matias and Szegedy 1999): the norm itself is right within some 1.1 %.
    """
    tasks = sorted({task for of_rank in ranks for task in of_rank})
    totals = {task: sum((of_rank[task] for of_rank in ranks if task in of_rank), np.zeros(WIDTH)) for task in tasks}
    return {task: float(np.linalg.norm(total)) / len(ranks) for task, total in totals.items()}
