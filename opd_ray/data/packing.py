"""Cuts a batch of sequences over ranks and micro-batches: lengths in, index lists and arrays out.

Suffixes: B sequences of a micro-batch, T positions of its rows, N flat response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """Sequences as the model reads them, and where the states that predict the response tokens lie."""

    input_ids_BT: npt.NDArray[np.int64]
    attention_mask_BT: npt.NDArray[np.int64]
    state_rows_N: npt.NDArray[np.int64]  # row in the flattened [B*T] states that predicts response token n
    response_ids_N: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]  # [B+1] response b is response_ids_N[offsets[b]:offsets[b+1]]


def partition(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Deal items to parts so that the dearest part costs little more than the mean: dearest first, to the lightest.

    Returns the item indices of each part in ascending order. No part is empty when there are enough items.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(num_parts), key=lambda part: (loads[part], len(parts[part])))
        parts[lightest].append(item)
        loads[lightest] += costs[item]
    return [sorted(part) for part in parts]


def micro_batches(lengths: Sequence[int], *, max_tokens: int, padded: bool) -> list[list[int]]:
    """Group sequences so that each micro-batch holds at most max_tokens positions, in few micro-batches.

    padded: the positions are those of a rectangle as long as its longest sequence, else the tokens themselves. Longest
    first, each into the first micro-batch with room. A sequence longer than max_tokens is refused: it fits nowhere.
    """
    cuts: list[list[int]] = []
    sizes: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > max_tokens:
            raise ValueError(
                f"a sequence of {length} tokens fits no micro-batch: learner.max_tokens_per_micro_batch is {max_tokens}"
            )
        grown = [size + (lengths[cut[0]] if padded else length) for cut, size in zip(cuts, sizes, strict=True)]
        # Into the last alone where padding counts: those before it are of longer sequences.
        fits = [i for i, size in enumerate(grown) if size <= max_tokens and not (padded and i < len(cuts) - 1)]
        if fits:
            cuts[fits[0]].append(item)
            sizes[fits[0]] = grown[fits[0]]
        else:
            cuts.append([item])
            sizes.append(length)
    return cuts


def micro_batches_by_kind(
    lengths: Sequence[int], kinds: Sequence[str], *, max_tokens: int, padded: bool
) -> list[list[int]]:
    """Group sequences as `micro_batches` does, but never sequences of different kinds."""
    cuts = []
    for kind in sorted(set(kinds)):
        items = [i for i, of_item in enumerate(kinds) if of_item == kind]
        of_kind = micro_batches([lengths[i] for i in items], max_tokens=max_tokens, padded=padded)
        cuts += [[items[i] for i in cut] for cut in of_kind]
    return cuts


def split_to(cuts: Sequence[Sequence[int]], lengths: Sequence[int], *, num_cuts: int) -> list[list[int]]:
    """Return at least as many micro-batches as asked for, where there are sequences enough, by halving the largest."""
    parts = [list(cut) for cut in cuts]
    while len(parts) < num_cuts:
        largest = max(
            (part for part in parts if len(part) > 1), key=lambda part: sum(lengths[i] for i in part), default=None
        )
        if largest is None:
            break
        parts.remove(largest)
        halves = partition([lengths[i] for i in largest], 2)
        parts += [[largest[i] for i in half] for half in halves]
    return parts


def training_cost(length: int, *, hidden_size: int) -> int:
    """Return what a sequence costs, in tokens of a short one: attention makes a token dearer by n / 12 hidden sizes.

    Of a layer with 12 hidden^2 weights: 24 hidden^2 operations a token, and 2 n hidden of causal attention.
    """
    return length + length * length // (12 * hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Sequences end to end in one row, and where the states that predict the response tokens lie."""

    input_ids_T: npt.NDArray[np.int64]
    position_ids_T: npt.NDArray[np.int64]  # of each sequence from 0
    lengths: tuple[int, ...]  # [B]
    state_rows_N: npt.NDArray[np.int64]
    response_ids_N: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]  # [B+1] response b is response_ids_N[offsets[b]:offsets[b+1]]


def pack(prompts: Sequence[npt.NDArray[np.int32]], responses: Sequence[npt.NDArray[np.int32]]) -> PackedBatch:
    """Lay out prompt + response of each sequence, one after the other."""
    pairs = list(zip(prompts, responses, strict=True))
    lengths = [len(p) + len(r) for p, r in pairs]
    ends = np.cumsum(lengths)
    return PackedBatch(
        input_ids_T=np.concatenate([part for pair in pairs for part in pair]).astype(np.int64),
        position_ids_T=np.concatenate([np.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        state_rows_N=np.concatenate(
            [np.arange(end - len(r) - 1, end - 1) for (_, r), end in zip(pairs, ends, strict=True)]
        ),
        response_ids_N=np.concatenate(responses).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum([len(r) for r in responses])]).astype(np.int64),
    )


def pad(prompts: Sequence[npt.NDArray[np.int32]], responses: Sequence[npt.NDArray[np.int32]]) -> PaddedBatch:
    """Lay out prompt + response of each sequence, padded on the right with id 0 under a zero attention mask."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    shape = (len(lengths), max(lengths))
    input_ids, attention_mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    rows = []
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[index, : lengths[index]] = np.concatenate([prompt, response])
        attention_mask[index, : lengths[index]] = 1
        rows.append(index * shape[1] + len(prompt) - 1 + np.arange(len(response)))
    return PaddedBatch(
        input_ids_BT=input_ids,
        attention_mask_BT=attention_mask,
        state_rows_N=np.concatenate(rows).astype(np.int64),
        response_ids_N=np.concatenate(responses).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum([len(r) for r in responses])]).astype(np.int64),
    )
