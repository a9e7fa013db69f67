"""Part `packing`: micro-batches without padding against padded ones on the CPU, and how evenly ranks are loaded."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from harness import Figure, at_least, at_most, run_script

from opd_ray.data.packing import training_cost
from opd_ray.protocol import GroupSummary
from workers.learner.attention import PackedLayout
from workers.learner.fleet import rank_batches
from workers.learner.report import RankBatch

_PART = "packing"
_NUM_GROUPS, _NUM_SAMPLES, _PROMPT_TOKENS = 64, 4, 32
_MAX_RESPONSE_TOKENS, _MEDIAN_RESPONSE_TOKENS, _SIGMA = 224, 64, 0.8  # of log-normal lengths
_MAX_TOKENS = 2048
_HIDDEN_SIZE = 384
_MIN_USEFUL, _MAX_IMBALANCE = 0.95, 0.05


def packing() -> Iterator[Figure]:
    """Yield the figures of the part; about 2 minutes on two cores."""
    groups = _groups()
    lengths = [_PROMPT_TOKENS + n for group in groups for n in group.response_lengths]
    cuts: dict[str, list[list[int]]] = {}  # lengths, by micro-batch
    for name, padded in (("packed", False), ("padded", True)):
        ((_, batch),) = _dealt(groups, num_ranks=1, padded=padded)
        cuts[name] = [[lengths[i] for i in cut] for cut in batch.micro_batches]
    num_tokens = sum(map(sum, cuts["packed"]))
    padded_positions = sum(len(cut) * max(cut) for cut in cuts["padded"])
    in_blocks = sum(_block_positions(cut) for cut in cuts["packed"])
    capacity = len(cuts["packed"]) * _MAX_TOKENS
    yield at_least(_MIN_USEFUL, part=_PART, name="fill", value=num_tokens / capacity, unit="of the token limit")
    yield Figure(part=_PART, name="padded_useful", value=num_tokens / padded_positions, unit="of positions")
    yield Figure(part=_PART, name="packed_useful_in_attention", value=num_tokens / in_blocks, unit="of positions")
    for num_ranks in (2, 4, 8):
        value = _imbalance(groups, num_ranks=num_ranks)
        yield at_most(_MAX_IMBALANCE, part=_PART, name=f"imbalance_{num_ranks}_ranks", value=value, unit="of mean cost")
    times: dict[str, float] = run_script("packing_cell.py", json.dumps(cuts))
    for name, cost in times.items():
        yield Figure(part=_PART, name=f"{name}_speed", value=num_tokens / cost, unit="tokens/s")
    yield Figure(part=_PART, name="speedup", value=times["padded"] / times["packed"], unit="ratio")


def _groups() -> list[GroupSummary]:
    random = np.random.default_rng(0)
    lengths = np.exp(np.log(_MEDIAN_RESPONSE_TOKENS) + _SIGMA * random.standard_normal((_NUM_GROUPS, _NUM_SAMPLES)))
    return [
        GroupSummary(
            prompt_index=index,
            task="bench",
            num_prompt_tokens=_PROMPT_TOKENS,
            response_lengths=tuple(row),
            num_loss_tokens=sum(row),
            num_truncated=0,
            rewards=(),
            oldest_version=0,
            text="",
            generate_s=0.0,
        )
        for index, row in enumerate(lengths.astype(int).clip(1, _MAX_RESPONSE_TOKENS).tolist())
    ]


def _dealt(groups: Sequence[GroupSummary], *, num_ranks: int, padded: bool) -> list[tuple[list[int], RankBatch]]:
    return rank_batches(
        groups,
        teachers=["teacher"] * len(groups),
        num_ranks=num_ranks,
        max_tokens=_MAX_TOKENS,
        padded=padded,
        hidden_size=_HIDDEN_SIZE,
        version=0,
    )


def _block_positions(lengths: Sequence[int]) -> int:
    """Return how many positions attention computes of a pack: its own blocks are padded."""
    return sum(block.numel() for block in PackedLayout.of(lengths, device=torch.device("cpu")).blocks)


def _imbalance(groups: Sequence[GroupSummary], *, num_ranks: int) -> float:
    """Return how much more than the mean the dearest rank computes."""
    costs = [
        sum(
            training_cost(_PROMPT_TOKENS + n, hidden_size=_HIDDEN_SIZE)
            for i in share
            for n in groups[i].response_lengths
        )
        for share, _ in _dealt(groups, num_ranks=num_ranks, padded=False)
    ]
    return max(costs) * num_ranks / sum(costs) - 1
