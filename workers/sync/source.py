"""The student's parameters, or its adapters, as they leave the learner: whole, in the type in which they travel."""

from collections.abc import Iterator
from typing import Any

import torch

from opd_ray.data.lora import adapter_parameters
from workers.weights import LoraSpec


class StudentWeights:
    """A re-iterable stream of (name, tensor), with its names, types and shapes known beforehand.

    Gathering a partitioned parameter (ZeRO-3) is a collective call: all ranks iterate at once, to the end.
    """

    def __init__(
        self, model: Any, *, dtype: torch.dtype, partitioned: bool, reads: bool, lora: LoraSpec | None = None
    ) -> None:
        """dtype: what larger parameters are rounded to. reads: false on a rank that only helps to gather.

        lora: of the adapters that alone are published.
        """
        self.lora = lora
        self._model = model
        self._dtype = dtype
        self._partitioned = partitioned
        self._reads = reads

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return name, type and whole shape of what iteration yields, without gathering anything."""
        return [(name, self._travelling_dtype(p), tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._named()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter; one that is neither gathered nor rounded shares the learner's memory.

        Raises ValueError at the first with a value that is not finite: such weights are given to nobody.
        """
        for name, parameter in self._named():
            whole = self._whole(parameter)
            if self._reads and not _is_finite(whole):
                raise ValueError(f"the student's weights are not finite, the first in {name}: they are not published")
            yield name, whole

    def _named(self) -> Iterator[tuple[str, Any]]:
        return iter(self._model.named_parameters() if self.lora is None else adapter_parameters(self._model))

    @torch.no_grad()
    def _whole(self, parameter: Any) -> torch.Tensor:
        if not self._partitioned:
            return parameter.detach().to(self._travelling_dtype(parameter))
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            if not self._reads:
                return torch.empty(0)
            return parameter.detach().to(self._travelling_dtype(parameter), copy=True)  # its memory is given back

    def _travelling_dtype(self, parameter: Any) -> torch.dtype:
        return self._dtype if self._dtype.itemsize < parameter.dtype.itemsize else parameter.dtype


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are, in one pass and without a copy."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))
