"""The cell of the packing benchmark: forward and backward passes over a batch, packed and padded, in turns."""

import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from models import random_20m
from transformers import Qwen3ForCausalLM

from opd_ray.data.packing import pack, pad
from workers.learner.attention import PACKED_ATTENTION, PackedLayout, register

_VOCAB_SIZE, _ROUNDS, _PROMPT_TOKENS = 8192, 3, 32
_MAX_DIFFERENCE = 1e-4  # of the gradients' norm


def main(cuts: dict[str, list[list[int]]]) -> None:
    """Print the median seconds of a pass over all micro-batches, of each layout."""
    model = _model()
    times: dict[str, list[float]] = {name: [] for name in cuts}
    norms = {}
    for _ in range(1 + _ROUNDS):
        for name, of_name in cuts.items():
            model.set_attn_implementation(PACKED_ATTENTION if name == "packed" else "sdpa")
            start = time.perf_counter()
            for lengths in of_name:
                _states(model, lengths, packed=name == "packed").square().sum().backward()
            times[name].append(time.perf_counter() - start)
            norms[name] = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
            model.zero_grad()
    difference = abs(norms["packed"] / norms["padded"] - 1)
    assert difference < _MAX_DIFFERENCE, difference
    print(json.dumps({name: statistics.median(of_name[1:]) for name, of_name in times.items()}))


def _model() -> Qwen3ForCausalLM:
    """Return a model of 20 million parameters."""
    register()
    return random_20m(vocab_size=_VOCAB_SIZE)


def _states(model: Qwen3ForCausalLM, lengths: Sequence[int], *, packed: bool) -> torch.Tensor:
    """Return the states before the response tokens of sequences with ids that are a function of their length."""
    texts = (
        [np.arange(_PROMPT_TOKENS, dtype=np.int32) for _ in lengths],
        [(np.arange(n - _PROMPT_TOKENS) * n % _VOCAB_SIZE).astype(np.int32) for n in lengths],
    )
    if packed:
        batch = pack(*texts)
        states_BTD = model.model(
            input_ids=torch.from_numpy(batch.input_ids_T[None]),
            position_ids=torch.from_numpy(batch.position_ids_T[None]),
            packing=PackedLayout.of(batch.lengths, device=torch.device("cpu")),
            use_cache=False,
        ).last_hidden_state
    else:
        batch = pad(*texts)
        states_BTD = model.model(
            input_ids=torch.from_numpy(batch.input_ids_BT),
            attention_mask=torch.from_numpy(batch.attention_mask_BT),
            use_cache=False,
        ).last_hidden_state
    return states_BTD.flatten(0, 1)[torch.from_numpy(batch.state_rows_N)]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
