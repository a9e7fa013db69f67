"""A fingerprint of a model's tensors: equal in every process that holds equal bits, another where one value differs.

Computed where the tensors lie, in exact integer arithmetic, so that no order of summation shows. It finds accidents
(a tensor discarded, overwritten, or of other weights), not attacks.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Fingerprint = Mapping[str, str]  # tensor's name -> its type, shape and hash

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_CHUNK_WORDS = 1 << 22  # hashed at a time: 32 MiB of 64-bit integers, three times
# Odd 64-bit constants of splitmix64, as signed integers; products and sums wrap around.
_STRIDE, _MIX = -7046029254386353131, -4658895280553007687
_HALF_BITS = 32
_NUM_COLUMNS = 16  # read of a matrix that is packed out of reach


def of_model(model: nn.Module) -> dict[str, str]:
    """Return the fingerprint of a vLLM model's parameters and buffers.

    vLLM's CPU build packs linear layers out of reach; of such a matrix some columns are read through the layer.
    """
    return of_tensors([*model.named_parameters(), *model.named_buffers(), *_packed(model)])


def of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return the fingerprint of named tensors."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} {_hash(t):016x}" for name, t in named}


def of_engine(engine: Any, **others: torch.Tensor) -> dict[str, str]:
    """Return the fingerprint of a vLLM engine's model, cut over processes or not, and of other tensors beside it."""
    parts: list[dict[str, str]] = engine.apply_model(of_model)
    by_part = {f"part {i}: {name}" if len(parts) > 1 else name: v for i, p in enumerate(parts) for name, v in p.items()}
    return by_part | of_tensors(others.items())


def differences(expected: Fingerprint, given: Fingerprint) -> list[str]:
    """Return the names of tensors that differ, or that only one of the two has, in order."""
    return sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))


@torch.inference_mode()
def _packed(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield columns of the matrices that are packed: products with unit vectors, which are exact."""
    from vllm.model_executor.layers.linear import LinearBase

    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase) or layer.weight.numel():
            continue
        num_inputs = layer.input_size_per_partition
        units = torch.zeros(_NUM_COLUMNS, num_inputs, dtype=layer.params_dtype)
        units[range(_NUM_COLUMNS), [column * num_inputs // _NUM_COLUMNS for column in range(_NUM_COLUMNS)]] = 1
        yield f"{name}.weight, {_NUM_COLUMNS} columns", layer.quant_method.apply(layer, units, None)


@torch.inference_mode()
def _hash(tensor: torch.Tensor) -> int:
    """Return the sum of all elements' bits, each times an odd number of its place, modulo 2^64.

    Odd numbers are invertible, so that one changed element always changes the sum; places keep order apart.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    words_N = flat.view(_WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words_N), _CHUNK_WORDS):
        chunk = words_N[start : start + _CHUNK_WORDS].to(torch.int64)
        factors = torch.arange(start, start + len(chunk), device=flat.device).mul_(_STRIDE)
        factors.bitwise_xor_(factors >> _HALF_BITS).mul_(_MIX).bitwise_or_(1)
        total += (chunk * factors).sum()
    return int(total) % (1 << 64)
