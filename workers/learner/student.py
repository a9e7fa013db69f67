"""The student as DeepSpeed trains it: a Hugging Face model from token ids to per-token losses, and its engine."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from opd_ray.config.offload import Offload, offloads
from opd_ray.config.schema import LearnerConfig, LrSchedule
from opd_ray.config.student import LoraConfig
from opd_ray.data.lora import add_adapters
from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, Signal, Tokens, keep_high_entropy
from opd_ray.objectives.comparison import COMPARISON
from workers.learner.attention import PACKED_ATTENTION, PackedLayout, register
from workers.learner.partitioning import gathered_by_module, partitioned_loading

_KNOWN = {**OBJECTIVES, "comparison": COMPARISON}
_SCHEDULES = {
    LrSchedule.constant: "constant_with_warmup",
    LrSchedule.linear: "linear",
    LrSchedule.cosine: "cosine",
}


_MAX_PACKING_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # of the largest state: rounding
_UNPACKABLE = "the student's attention cannot be packed: set learner.packing=false"


class Student(nn.Module):
    """Wraps a causal LM so that one forward pass gives an objective's losses; logits of prompt tokens never exist."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        state_rows_N: Tensor,
        *,
        sequences: Mapping[str, Any],
        objective: str,
        tokens: Tokens,
        signal: Signal,
        options: ObjectiveOptions,
    ) -> tuple[Any, ...]:
        """Return the fields of the objective's `Losses`, in order: DeepSpeed's hooks look into tuples only.

        sequences: what the model takes, packed or padded. state_rows_N: rows of its flattened final states.
        """
        states_BTD = self.model.base_model(**sequences, use_cache=False).last_hidden_state
        hidden_ND = states_BTD.flatten(0, 1).index_select(0, state_rows_N)
        head_VD = self.head_VD
        tokens = keep_high_entropy(hidden_ND, head_VD, tokens=tokens, options=options)
        losses = _KNOWN[objective].losses(hidden_ND, head_VD, tokens=tokens, signal=signal, options=options)
        return tuple(getattr(losses, field.name) for field in fields(losses))

    @property
    def head_VD(self) -> nn.Parameter:
        """Return the output matrix."""
        return self.model.get_output_embeddings().weight


def load_student(path: str, *, config: LearnerConfig, lora: LoraConfig | None = None) -> Student:
    """Load the model with float32 master weights, or in bfloat16 where DeepSpeed keeps the master copy.

    At ZeRO-3 a rank gets its part of every parameter; all ranks load at once.
    lora: freeze it and train these adapters, in float32 whatever the type of the frozen weights.
    """
    from transformers import AutoModelForCausalLM

    with partitioned_loading(deepspeed_config(config, world_size=config.num_ranks)):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype.value), use_safetensors=True, trust_remote_code=False
        )
    if config.packing:
        with gathered_by_module(model):
            use_packed_attention(model)
    if config.gradient_checkpointing:
        recompute_layers(model)
    if lora is not None:
        add_adapters(model, lora)
    return Student(model)


def recompute_layers(model: Any) -> None:
    """Have a causal LM keep the input of each layer alone for the backward pass: gradient checkpointing.

    transformers recomputes in training mode only. Just the layers are put into it: a student has no dropout, its
    log-probs are those of the policy that sampled.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


@torch.no_grad()
def use_packed_attention(model: Any) -> None:
    """Have a causal LM compute packed sequences, and try it on three.

    Raises ValueError for a model that does not give the states of each sequence alone.
    """
    if not model._supports_attention_backend:
        raise ValueError(f"{_UNPACKABLE} ({type(model).__name__} has one of its own)")
    register()
    device = next(model.parameters()).device
    sequences = [torch.tensor([ids], device=device) for ids in ([1, 2, 3], [3, 1], [2, 2, 1, 3, 1])]
    model.eval()
    alone = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state for ids in sequences]
    model.set_attn_implementation(PACKED_ATTENTION)
    lengths = [ids.shape[1] for ids in sequences]
    try:
        packed = model.base_model(
            input_ids=torch.cat(sequences, dim=1),
            position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
            packing=PackedLayout.of(lengths, device=device),
            use_cache=False,
        ).last_hidden_state
        gap = float((packed - torch.cat(alone, dim=1)).abs().max() / packed.abs().max())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_UNPACKABLE} ({error})") from None
    if not gap < _MAX_PACKING_GAP[packed.dtype]:
        raise ValueError(f"{_UNPACKABLE} (its states differ by {gap:.2g} of the largest)")


def deepspeed_config(config: LearnerConfig, *, world_size: int, adapters: bool = False) -> dict[str, Any]:
    """Return DeepSpeed's configuration; `learner.engine_args` are merged over it, block by block.

    adapters: all that is trained is in float32 already, and DeepSpeed must leave the frozen weights' type alone.
    """
    # DeepSpeed's own AdamW is compiled on first use, which needs a compiler: worth it for what a rank on a GPU keeps in
    # the machine's memory, where torch's is several times slower by DeepSpeed's account.
    compiled_adam = config.gpus_per_rank > 0 and offloads(config, Offload.optimizer)
    base: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,  # nominal: micro-batches are cut by tokens, one backward each
        "managed_gradient_accumulation": False,  # step() is the boundary
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.dtype.value == "bfloat16" and not adapters},
        "gradient_clipping": config.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": [config.beta1, config.beta2],
                "weight_decay": config.weight_decay,
                "torch_adam": not compiled_adam,
            },
        },
        "steps_per_print": 2**31,
    }
    return _merged(base, config.engine_args)


def build_engine(student: Student, *, config: LearnerConfig, world_size: int, num_steps: int) -> Any:
    """Put the student under DeepSpeed; torch.distributed must be up."""
    import deepspeed
    from transformers import get_scheduler

    def scheduler(optimizer: Any) -> Any:
        num_updates = num_steps * config.updates_per_batch
        return get_scheduler(_SCHEDULES[config.lr_schedule], optimizer, config.warmup_steps, num_updates)

    trained = [p for p in student.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=student,
        model_parameters=trained,
        lr_scheduler=scheduler,
        config=deepspeed_config(config, world_size=world_size, adapters=len(trained) < len(list(student.parameters()))),
    )
    if config.zero_stage == 3:  # the head is read outside its own module's forward
        deepspeed.zero.register_external_parameter(student, student.head_VD)
    return engine


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_blocks = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both_blocks else value
    return merged
