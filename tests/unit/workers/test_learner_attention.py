"""Packing must change no state and no gradient: against each sequence by itself."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from workers.learner.attention import PackedLayout, packed_attention
from workers.learner.student import use_packed_attention

CPU = torch.device("cpu")
VOCAB_SIZE = 19
LENGTHS = [7, 1, 30, 6, 6, 29, 2]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
CONFIGS = {
    "grouped heads": Qwen3Config(**SHAPE),
    "as many heads": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "sliding window": MistralConfig(**SHAPE, sliding_window=5),
    "some layers with a window": Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
}


def make_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32)


def make_sequences(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (1, n), generator=generator) for n in lengths]


def packed_logprobs(model: Any, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    lengths = [ids.shape[1] for ids in sequences]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    layout = PackedLayout.of(lengths, device=CPU)
    output = model(input_ids=torch.cat(sequences, dim=1), position_ids=positions, packing=layout, use_cache=False)
    return output.logits[0].log_softmax(-1)


def gradients(model: Any, logprobs_TV: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, logprobs_TV.numel()).view_as(logprobs_TV)
    return list(torch.autograd.grad((logprobs_TV * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packing_changes_no_logprob_and_no_gradient(config: PreTrainedConfig):
    model, sequences = make_model(config), make_sequences(LENGTHS)
    alone = torch.cat([model(ids, use_cache=False).logits[0].log_softmax(-1) for ids in sequences])
    expected = gradients(model, alone)
    use_packed_attention(model)
    packed = packed_logprobs(model, sequences)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    for gradient, other in zip(gradients(model, packed), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=2e-5 * float(other.abs().max() + 1), rtol=1e-4)


def test_no_token_sees_another_sequence():
    model = make_model(CONFIGS["grouped heads"])
    use_packed_attention(model)
    sequences = make_sequences(LENGTHS)
    before = packed_logprobs(model, sequences)
    for changed, ids in enumerate(sequences):
        others = [(other + 1) % VOCAB_SIZE if i != changed else ids for i, other in enumerate(sequences)]
        after = packed_logprobs(model, others)
        rows = slice(sum(LENGTHS[:changed]), sum(LENGTHS[: changed + 1]))
        torch.testing.assert_close(after[rows], before[rows], atol=1e-6, rtol=0)
        assert float((after - before).detach().abs().max()) > 0.01


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_layout_has_every_token_once_in_blocks_of_similar_length(lengths: list[int]):
    layout = PackedLayout.of(lengths, device=CPU)
    flat = torch.cat([block.flatten() for block in layout.blocks])
    assert torch.equal(flat[layout.places_T], torch.arange(sum(lengths)))
    assert layout.longest == max(lengths)
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for block in layout.blocks:
        owners = sequence_of[block]
        assert (owners == owners[:, :1]).all()
        assert all(lengths[i] >= 0.8 * block.shape[1] for i in owners[:, 0].tolist())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(**SHAPE, attn_logit_softcapping=1.0), "softcap"),
        (BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=4), "BloomForCausalLM"),
    ],
    ids=["a soft cap", "an attention of its own"],
)
def test_a_model_whose_attention_is_of_another_kind_is_refused_by_key(config: PreTrainedConfig, why: str):
    with pytest.raises(ValueError, match=r"set learner\.packing=false") as refusal:
        use_packed_attention(make_model(config))
    assert why in str(refusal.value)


def test_a_mask_is_refused():
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="mask"):
        packed_attention(None, states, states, states, torch.ones(1, 1, 3, 3), packing=PackedLayout.of([3], device=CPU))
