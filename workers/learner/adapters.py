"""Writes a student with adapters to disk: the adapters by themselves, and merged into the weights they change."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from opd_ray.data.lora import adapter_parameters, peft_config

_ADAPTER_FOLDER, _ADAPTER_FILE = "adapter", "adapter_model.safetensors"  # the file's name is peft's


def export_merged(model: Any, *, base_path: str, folder: str, dtype: torch.dtype) -> None:
    """Write the adapters in peft's format to `folder`/adapter, and the student with them merged in to `folder`.

    model's adapters must be gathered, its frozen weights need not be: they are read from base_path. They are added in
    float32, so that a narrower dtype rounds once.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter_folder = Path(folder) / _ADAPTER_FOLDER
    adapter_folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter_parameters(model)}
    save_file(tensors, adapter_folder / _ADAPTER_FILE, metadata={"format": "pt"})
    peft_config(model).save_pretrained(str(adapter_folder))
    base = AutoModelForCausalLM.from_pretrained(
        base_path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    merged.to(dtype).save_pretrained(folder, safe_serialization=True)
