"""How far the gradients of micro-batches are from one another."""

import torch
from torch import Tensor, nn


class GradientSquares:
    """Adds up the squared norms of micro-batches' own gradients: hooks see each before it is added to the others.

    So it is at every ZeRO stage, where the sum itself is spread over ranks; a tied weight counts once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add)

    def take(self) -> float:
        """Return the sum since the last call, over all parameters and backward passes."""
        parts, self._parts = self._parts, []
        return float(torch.stack(parts).sum()) if parts else 0.0

    def _add(self, gradient: Tensor) -> None:
        self._parts.append(gradient.detach().double().square().sum())


def gradient_noise(*, squares: float, num_micro_batches: int, norm: float) -> float | None:
    """Return tr(cov) / |G|^2 of M micro-batches' gradients, M estimates of their mean G; None below two or without any.

    squares: sum_i |h_i|^2 of the contributions h_i that add up to G, each a gradient's M-th part; norm: |G|. The
    covariance is the unbiased one of M h_i, (M^2 sum |h_i|^2 - M |G|^2) / (M - 1). It is what McCandlish et al. 2018
    (arXiv 1812.06162) call the simple noise scale, in micro-batches: so many of them, averaged, have as much noise as
    gradient.
    """
    if num_micro_batches < 2 or norm == 0:
        return None
    m = num_micro_batches
    return max((m**2 * squares - m * norm**2) / (m - 1), 0.0) / norm**2
