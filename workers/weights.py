"""The weight contract: a named set of tensors as bytes, and a manifest that says what they are.

A publication is one object of Ray's store with a buffer for each tensor. Ray copies the buffers into the object from
where they lie, in the learner's own parameters if need be; every rollout worker reads them there without a copy.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Buffers = tuple[npt.NDArray[np.uint8], ...]  # the bytes of each tensor, in the manifest's order


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """One tensor of a publication."""

    name: str  # as in the Hugging Face checkpoint, or in peft's
    dtype: str  # float32 | bfloat16 | float16
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """How adapters change the weights W that they are published without: to W + (alpha / rank) B A."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What one publication holds."""

    version: int
    entries: tuple[WeightEntry, ...]
    lora: LoraSpec | None = None  # None: all weights of the model; else its adapters alone, under peft's names

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(entry.num_bytes for entry in self.entries)


def plan_manifest(
    shapes: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, version: int, lora: LoraSpec | None = None
) -> WeightManifest:
    """Return the manifest of tensors given by name, type and shape."""
    entries = tuple(
        WeightEntry(
            name=name,
            dtype=str(dtype).removeprefix("torch."),
            shape=tuple(shape),
            num_bytes=int(np.prod(shape, dtype=np.int64)) * dtype.itemsize,
        )
        for name, dtype, shape in shapes
    )
    return WeightManifest(version=version, entries=entries, lora=lora)


def as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes: a view of them, unless it lies on another device or is strided."""
    flat = tensor.detach().to("cpu", copy=False).contiguous().reshape(-1).view(torch.uint8)
    array: npt.NDArray[np.uint8] = flat.numpy()
    return array


def published(
    tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, lora: LoraSpec | None = None
) -> tuple[WeightManifest, Buffers]:
    """Return named tensors as a publication that shares their memory."""
    named = list(tensors)
    manifest = plan_manifest(((name, t.dtype, tuple(t.shape)) for name, t in named), version=version, lora=lora)
    return manifest, tuple(as_bytes(tensor) for _, tensor in named)


def read_tensors(buffers: Buffers, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) views into the buffers; nothing is copied and nothing may be written."""
    if len(buffers) != len(manifest.entries):
        raise ValueError(f"{len(buffers)} weight buffers, their manifest says {len(manifest.entries)}")
    for entry, buffer in zip(manifest.entries, buffers, strict=True):
        if buffer.nbytes != entry.num_bytes:
            raise ValueError(f"weight buffer {entry.name} holds {buffer.nbytes} bytes, not {entry.num_bytes}")
        dtype = _DTYPES[entry.dtype]
        with warnings.catch_warnings():  # Ray's arrays are read-only, and so is what is made of them
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(buffer.view(f"i{dtype.itemsize}"))
        yield entry.name, flat.view(dtype).reshape(entry.shape)


def check_publication(
    manifest: WeightManifest, buffers: Buffers | None, *, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless a publication holds exactly the tensors of a model, whole.

    shapes: of the model's tensors. buffers: None where they come on another way.
    """
    given = {entry.name: entry.shape for entry in manifest.entries}
    for problem, names in (
        ("lacks", shapes.keys() - given.keys()),
        ("has, unknown to the model,", given.keys() - shapes.keys()),
    ):
        if names:
            raise ValueError(
                f"version {manifest.version} {problem} {len(names)} tensors: {', '.join(sorted(names)[:3])}"
            )
    for name, shape in given.items():
        if shape != shapes[name]:
            raise ValueError(f"version {manifest.version}: {name} has shape {shape}, the model's has {shapes[name]}")
    if buffers is not None:
        for _ in read_tensors(buffers, manifest):
            pass
