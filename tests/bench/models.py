"""Random models for the benchmarks."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

_SEED = 0


def random_model(**shape: Any) -> Qwen3ForCausalLM:
    """Return a float32 model with a tied head and heads of 64; shape: the rest of `Qwen3Config`."""
    torch.manual_seed(_SEED)
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = Qwen3Config(head_dim=64, tie_word_embeddings=True, dtype="float32", **no_tokens, **shape)
    return Qwen3ForCausalLM(config)
