"""Low-rank adapters on a Hugging Face model: where they go, what their tensors are called, how large they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd_ray.config.student import ALL_LINEAR, LoraConfig

_ADAPTER = "default"  # peft's name for the only adapter of a model


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """What training adapters comes to."""

    num_trainable: int
    num_parameters: int  # of the frozen model
    num_bytes: int  # published with each version


def add_adapters(model: Any, lora: LoraConfig) -> None:
    """Freeze a causal LM and put float32 adapters on its modules. The same seed gives the same adapters everywhere.

    Raises ValueError for modules that the model does not have.
    """
    from peft import LoraConfig as PeftConfig

    target_modules = _target_modules(model, lora)
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        model.add_adapter(
            PeftConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number serves
                target_modules=target_modules,
                task_type="CAUSAL_LM",
            )
        )
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()  # peft gives them the type of the frozen weights


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' tensors under the names that peft's files give them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}", parameter


def peft_config(model: Any) -> Any:
    """Return peft's own configuration of a model's adapters."""
    return model.peft_config[_ADAPTER]


def adapter_size(model_config: Any, lora: LoraConfig) -> AdapterSize:
    """Return what adapters on a model of this configuration come to; its weights are not read.

    Raises ValueError for modules that the model does not have.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        add_adapters(model, lora)
    adapters = [parameter for _, parameter in adapter_parameters(model)]
    return AdapterSize(
        num_trainable=sum(parameter.numel() for parameter in adapters),
        num_parameters=num_parameters,
        num_bytes=sum(parameter.numel() * parameter.element_size() for parameter in adapters),
    )


def describe_adapters(lora: LoraConfig, size: AdapterSize) -> str:
    """Return what is trained and published, for people."""
    return (
        f"LoRA rank {lora.rank}, {size.num_trainable:,} trainable of {size.num_parameters:,} parameters, adapter"
        f" {size.num_bytes / 1e6:,.1f} MB published"
    )


def _target_modules(model: Any, lora: LoraConfig) -> list[str]:
    """Return the last parts of the names of the modules that get adapters."""
    head = model.get_output_embeddings()
    linear = (n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    there = sorted({name.rpartition(".")[2] for name in linear})
    if lora.target_modules == [ALL_LINEAR]:
        return there
    unknown = [name for name in lora.target_modules if name not in there]
    if unknown:
        raise ValueError(
            f"student.lora.target_modules={lora.target_modules}: the student has no {', '.join(unknown)}; expected"
            f" [{ALL_LINEAR}] or some of {', '.join(there)}"
        )
    return lora.target_modules
