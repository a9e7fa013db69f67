"""Reads the output head of a checkpoint without the rest of the model."""

import json

import torch
from safetensors import safe_open

from opd_ray.data.hub import local_folder

_NAMES = ("lm_head.weight", "model.embed_tokens.weight")  # untied, tied


def load_head(model_path: str, *, vocab_size: int | None = None) -> torch.Tensor:
    """Return the output head [vocab_size, D] of a Hugging Face model.

    A tied model has no head of its own: its input embedding is the head. Rows beyond `vocab_size` (padding) are cut;
    None: all rows.
    Raises ValueError when the checkpoint holds neither.
    """
    folder = local_folder(model_path)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for name in (n for n in _NAMES if n in files or not files):
        with safe_open(folder / files.get(name, "model.safetensors"), framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                return tensors.get_slice(name)[:vocab_size].clone()
    raise ValueError(f"{model_path} holds no output head: expected {' or '.join(_NAMES)} as safetensors")
