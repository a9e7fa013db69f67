"""The weight contract: a named set of tensors as one contiguous buffer and a manifest that says what lies where.

The buffer travels through Ray's object store once per publication; every rollout worker reads it without a copy.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT_BYTES = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """One tensor of a publication."""

    name: str  # as in the Hugging Face checkpoint, or in peft's
    dtype: str  # float32 | bfloat16 | float16
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """How adapters change the weights W that they are published without: to W + (alpha / rank) B A."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What one published buffer holds."""

    version: int
    entries: tuple[WeightEntry, ...]
    num_bytes: int
    lora: LoraSpec | None = None  # None: all weights of the model; else its adapters alone, under peft's names


def plan_manifest(
    shapes: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, version: int, lora: LoraSpec | None = None
) -> WeightManifest:
    """Lay tensors out one after another, each aligned to 64 bytes."""
    entries, offset = [], 0
    for name, dtype, shape in shapes:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries.append(
            WeightEntry(
                name=name,
                dtype=str(dtype).removeprefix("torch."),
                shape=tuple(shape),
                offset_bytes=offset,
                num_bytes=num_bytes,
            )
        )
        offset += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return WeightManifest(version=version, entries=tuple(entries), num_bytes=offset, lora=lora)


def write_tensor(buffer: npt.NDArray[np.uint8], entry: WeightEntry, tensor: torch.Tensor) -> None:
    """Copy one tensor to its place in the buffer."""
    flat = tensor.detach().to("cpu", copy=False).contiguous().reshape(-1).view(torch.uint8)
    buffer[entry.offset_bytes : entry.offset_bytes + entry.num_bytes] = flat.numpy()


def read_tensors(buffer: npt.NDArray[np.uint8], manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) views into the buffer; nothing is copied and nothing may be written."""
    if buffer.nbytes != manifest.num_bytes:
        raise ValueError(f"weight buffer holds {buffer.nbytes} bytes, its manifest says {manifest.num_bytes}")
    with warnings.catch_warnings():  # Ray's arrays are read-only, and so is what is made of them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        whole = torch.from_numpy(buffer)
    for entry in manifest.entries:
        flat = whole[entry.offset_bytes : entry.offset_bytes + entry.num_bytes]
        yield entry.name, flat.view(_DTYPES[entry.dtype]).reshape(entry.shape)
