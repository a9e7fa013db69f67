"""Random models for the benchmarks."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

_SEED = 0


def random_20m(*, vocab_size: int) -> Qwen3ForCausalLM:
    """Return a random model of 20 million parameters, to train."""
    return random_model(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=6,
    ).train()


def random_model(**shape: Any) -> Qwen3ForCausalLM:
    """Return a float32 model with a tied head and heads of 64; shape: the rest of `Qwen3Config`."""
    torch.manual_seed(_SEED)
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = Qwen3Config(head_dim=64, tie_word_embeddings=True, dtype="float32", **no_tokens, **shape)
    return Qwen3ForCausalLM(config)
