"""The teacher of the scoring benchmark, and the sequences it reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from models import random_model

from opd_ray.protocol import Int32, TrajectoryGroup

VOCAB_SIZE = 32_768
NUM_SEQUENCES, SEQUENCE_TOKENS = 16, 256
_SEED = 0
# Tied, so also of the logits: times the norm of a final state, the root of the width, they vary by 2.4 nats.
_EMBEDDING_STD, _WEIGHT_STD = 0.12, 0.05


def save_teacher(folder: Path) -> None:
    """Write a random float32 model of 20 million parameters."""
    model = random_model(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        initializer_range=_WEIGHT_STD,
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING_STD)
    model.save_pretrained(folder)


def make_group(
    *, num_samples: int, prompt_tokens: int, response_tokens: int, vocab_size: int = VOCAB_SIZE, support_size: int = 0
) -> TrajectoryGroup:
    """Return random responses to a random prompt, with random supports, whose ids may repeat."""
    random = np.random.default_rng(_SEED)
    num_tokens = num_samples * response_tokens
    return TrajectoryGroup(
        prompt_ids=random.integers(vocab_size, size=prompt_tokens, dtype=np.int32),
        response_ids=random.integers(vocab_size, size=num_tokens, dtype=np.int32),
        offsets=np.arange(0, num_tokens + 1, response_tokens, dtype=np.int32),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        token_versions=np.zeros(num_tokens, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=random.integers(vocab_size, size=(num_tokens, support_size), dtype=np.int32),
        rewards=np.empty(0, dtype=np.float32),
        finish=np.zeros(num_samples, dtype=np.int8),
        prompt_index=0,
        task="none",
        seed=0,
    )


def sequences(group: TrajectoryGroup) -> Sequence[Int32]:
    """Return prompt and response of each sample."""
    bounds = zip(group.offsets[:-1], group.offsets[1:], strict=True)
    return [np.concatenate([group.prompt_ids, group.response_ids[a:b]]) for a, b in bounds]
