"""The student's adapters inside a vLLM engine: one slot, whose content each published version replaces.

vLLM is imported when an engine is built: the driver needs the names only.
"""

from typing import Any, get_args

from opd_ray.config.student import LoraConfig
from workers.weights import Buffers, WeightManifest, read_tensors

_ID = 1  # of the slot; vLLM counts from 1


def adapter_args(lora: LoraConfig | None) -> dict[str, Any]:
    """Return vLLM's arguments for an engine with room for the student's adapters, or for none."""
    if lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks

    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank),
    }


def adapter_request() -> Any:
    """Return what a request must carry to be sampled with the adapters."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name="student", lora_int_id=_ID, lora_path="published, never read from disk")


def load_adapters(engine: Any, manifest: WeightManifest, buffers: Buffers) -> None:
    """Put a publication of adapters into the engine's slot, between two of its steps; running sequences go on."""
    engine.collective_rpc(_replace, args=(manifest, buffers))


def _replace(worker: Any, manifest: WeightManifest, buffers: Buffers) -> None:
    """Do in one of vLLM's processes what its `add_lora` does with `load_inplace`, from memory in place of a folder."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    assert manifest.lora is not None
    lora = manifest.lora
    manager = worker.model_runner.lora_manager
    slots = manager._adapter_manager
    mapper = getattr(slots.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        _ID,
        # Copies: vLLM scales B in place, and the buffers are Ray's, read-only and shared.
        {name: tensor.clone() for name, tensor in read_tensors(buffers, manifest)},
        PEFTHelper(r=lora.rank, lora_alpha=lora.alpha, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(slots.model, "lora_skip_prefixes", None),
    )
    names = set(adapter.loras)
    slots.remove_adapter(_ID)
    slots.add_adapter(adapter)
    slots.activate_adapter(_ID)
    _check_all_placed(slots, names)


def _check_all_placed(slots: Any, names: set[str]) -> None:
    """Raise ValueError when the engine has no layer for some adapter: it would be left out without a word."""
    layers = set(slots.modules) | {part for parts in slots.packed_modules.values() for part in parts}
    lost = sorted(names - layers)
    if lost:
        raise ValueError(
            f"vLLM takes no adapter on {', '.join(lost[:3])} ({len(lost)} in all): expected student.lora.target_modules"
            " that it takes"
        )
