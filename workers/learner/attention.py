"""Attention over sequences packed end to end into one row: each attends to itself alone, and no padding is computed.

On a GPU in half precision this is torch's variable-length flash attention. Elsewhere sequences of similar length share
one causal product: what is padded on their right is seen by no token before it, so the result is exact.

Suffixes: B sequences and T tokens of the pack, b sequences and t positions of a block, H heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PACKED_ATTENTION = "opd_ray_packed"  # its name in transformers
_MIN_FILL = 0.8  # of a block's longest sequence; shorter ones begin the next block
# What models hand to any attention and what does not change this one.
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Where the sequences of a pack lie."""

    bounds_B1: Tensor  # int32 [B+1]: sequence b is rows bounds[b]:bounds[b+1]
    longest: int
    blocks: tuple[Tensor, ...]  # int64 [b,t] each: rows of sequences of similar length, their last row repeated
    places_T: Tensor  # int64 [T]: where each row lies when all blocks are flattened end to end

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device) -> Self:
        """Lay out sequences of these lengths, in order."""
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        for item in order:
            if groups and lengths[item] >= _MIN_FILL * lengths[groups[-1][0]]:
                groups[-1].append(item)
            else:
                groups.append([item])
        blocks, places, first = [], torch.empty(int(bounds[-1]), dtype=torch.int64), 0
        for group in groups:
            starts, ends = bounds[group], bounds[[i + 1 for i in group]]
            num_positions = lengths[group[0]]
            rows = starts[:, None] + torch.arange(num_positions)
            real = rows < ends[:, None]
            places[rows[real]] = first + real.flatten().nonzero().squeeze(1)
            blocks.append(torch.where(real, rows, ends[:, None] - 1).to(device))
            first += rows.numel()
        return cls(
            bounds_B1=bounds.to(device, torch.int32),
            longest=max(lengths),
            blocks=tuple(blocks),
            places_T=places.to(device),
        )


def packed_attention(  # noqa: PLR0913 - transformers' signature of an attention
    module: Any,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention [1,T,H,D] within each sequence; keys and values may have fewer heads.

    sliding_window: a token sees itself and the window - 1 tokens before it.

    Raises ValueError for what this attention does not know: a model's own kind of attention must not be lost silently.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention knows no {', '.join(unknown) or 'mask, nor attention that is not causal'}")
    states = query_1HTD, key_1HTD, value_1HTD
    half = query_1HTD.dtype in (torch.bfloat16, torch.float16)
    if query_1HTD.is_cuda and half and dropout == 0:
        return _varlen(states, packing=packing, scaling=scaling, window=sliding_window), None
    return _blocks(states, packing=packing, scaling=scaling, dropout=dropout, window=sliding_window), None


def register() -> None:
    """Make the attention known to transformers under its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _blocks(
    states: tuple[Tensor, ...], *, packing: PackedLayout, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    parts = []
    for rows_bt in packing.blocks:
        num_positions = rows_bt.shape[1]
        banded = window is not None and num_positions > window
        out_bHtD = scaled_dot_product_attention(
            *(_gathered(of_kind, rows_bt) for of_kind in states),
            attn_mask=_band(num_positions, window, device=rows_bt.device) if banded else None,
            is_causal=not banded,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=_is_grouped(states),
        )
        parts.append(out_bHtD.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, packing.places_T)[None]


def _gathered(states_1HTD: Tensor, rows_bt: Tensor) -> Tensor:
    """Return the rows of a block, [b,H,t,D]."""
    return states_1HTD[0].index_select(1, rows_bt.flatten()).unflatten(1, rows_bt.shape).transpose(0, 1)


def _band(num_positions: int, window: int | None, *, device: torch.device) -> Tensor:
    """Return which key (column) each query (row) sees, bool [t,t]."""
    assert window is not None
    steps = torch.arange(num_positions, device=device)
    distance = steps[:, None] - steps
    return (distance >= 0) & (distance < window)


def _varlen(states: tuple[Tensor, ...], *, packing: PackedLayout, scaling: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out_THD: Tensor = varlen_attn(
        *(of_kind[0].transpose(0, 1) for of_kind in states),
        cu_seq_q=packing.bounds_B1,
        cu_seq_k=packing.bounds_B1,
        max_q=packing.longest,
        max_k=packing.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=_is_grouped(states),
    )
    return out_THD[None]


def _is_grouped(states: tuple[Tensor, ...]) -> bool:
    """Whether several query heads share one head of keys and values."""
    query, key, _ = states
    return query.shape[1] != key.shape[1]
