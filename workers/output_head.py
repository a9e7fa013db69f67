"""Reads the output head of a checkpoint without the rest of the model."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from opd_ray.data.hub import local_folder

_NAMES = ("lm_head.weight", "model.embed_tokens.weight")  # untied, tied
_QUANTISED_HEAD = "lm_head."  # such as lm_head.qweight
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_head(model_path: str, *, vocab_size: int | None = None) -> torch.Tensor:
    """Return the output head [vocab_size, D] of a Hugging Face model.

    A tied model has no head of its own: its input embedding is the head. Rows beyond `vocab_size` (padding) are cut;
    None: all rows. It is read from the files, so that an engine may hold its weights in any number of processes; a
    quantised model is read as well when, as usual, its head is not quantised.
    Raises ValueError when the checkpoint holds neither, or the head is quantised.
    """
    folder = local_folder(model_path)
    files = _files(folder)
    for name in (n for n in _NAMES if n in files):
        if name != _NAMES[0] and any(other.startswith(_QUANTISED_HEAD) for other in files):
            break  # the embedding is another matrix
        with safe_open(folder / files[name], framework="pt") as tensors:
            head = tensors.get_slice(name)[:vocab_size].clone()
        if head.dtype in _FLOATS:
            return head
        break
    raise ValueError(
        f"{model_path} holds no output head: expected {' or '.join(_NAMES)} as safetensors in float32, bfloat16 or"
        " float16"
    )


def _files(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text())["weight_map"])
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def head_of(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the output head among a model's named weights: its input embedding where the two are tied."""
    return next(tensors[name] for name in _NAMES if name in tensors)
