"""The student as DeepSpeed trains it: a Hugging Face model from token ids to per-token losses, and its engine."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from opd_ray.config.schema import LearnerConfig, LrSchedule
from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, Signal, Tokens, keep_high_entropy

_SCHEDULES = {
    LrSchedule.constant: "constant_with_warmup",
    LrSchedule.linear: "linear",
    LrSchedule.cosine: "cosine",
}


class Student(nn.Module):
    """Wraps a causal LM so that one forward pass gives an objective's losses; logits of prompt tokens never exist."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(  # noqa: PLR0913 - one call is one pass through the engine's hooks
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        state_rows_N: Tensor,
        *,
        objective: str,
        tokens: Tokens,
        signal: Signal,
        options: ObjectiveOptions,
    ) -> tuple[Any, ...]:
        """Return the fields of the objective's `Losses`, in order: DeepSpeed's hooks look into tuples only."""
        states_BTD = self.model.base_model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False
        ).last_hidden_state
        hidden_ND = states_BTD.flatten(0, 1).index_select(0, state_rows_N)
        head_VD = self.head_VD
        tokens = keep_high_entropy(hidden_ND, head_VD, tokens=tokens, options=options)
        losses = OBJECTIVES[objective].losses(hidden_ND, head_VD, tokens=tokens, signal=signal, options=options)
        return tuple(getattr(losses, field.name) for field in fields(losses))

    @property
    def head_VD(self) -> nn.Parameter:
        """Return the output matrix."""
        return self.model.get_output_embeddings().weight


def load_student(path: str, *, config: LearnerConfig) -> Student:
    """Load the model with float32 master weights, or in bfloat16 where DeepSpeed keeps the master copy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, config.dtype.value), use_safetensors=True, trust_remote_code=False
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(model)


def deepspeed_config(config: LearnerConfig, *, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; `learner.engine_args` are merged over it, block by block."""
    base: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,  # nominal: micro-batches are cut by tokens, one backward each
        "managed_gradient_accumulation": False,  # step() is the boundary
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.dtype.value == "bfloat16"},
        "gradient_clipping": config.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": [config.beta1, config.beta2],
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # DeepSpeed's own would be compiled on first use
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
        return get_scheduler(_SCHEDULES[config.lr_schedule], optimizer, config.warmup_steps, num_steps)

    engine, *_ = deepspeed.initialize(
        model=student,
        model_parameters=[p for p in student.parameters() if p.requires_grad],
        lr_scheduler=scheduler,
        config=deepspeed_config(config, world_size=world_size),
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
