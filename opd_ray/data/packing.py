"""Cuts a batch of sequences over ranks and micro-batches: lengths in, index lists and arrays out.

Suffixes: B sequences of a micro-batch, T padded positions, N flat response tokens.
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


def micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group sequences of similar length so that each padded micro-batch holds at most max_tokens positions.

    A sequence longer than max_tokens is refused: it fits no micro-batch.
    """
    cuts: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > max_tokens:
            raise ValueError(
                f"a sequence of {lengths[item]} tokens fits no micro-batch: learner.max_tokens_per_micro_batch is"
                f" {max_tokens}"
            )
        longest = lengths[cuts[-1][0]] if cuts else 0
        if cuts and longest * (len(cuts[-1]) + 1) <= max_tokens:
            cuts[-1].append(item)
        else:
            cuts.append([item])
    return cuts


def micro_batches_by_kind(lengths: Sequence[int], kinds: Sequence[str], *, max_tokens: int) -> list[list[int]]:
    """Group sequences as `micro_batches` does, but never sequences of different kinds."""
    cuts = []
    for kind in sorted(set(kinds)):
        items = [i for i, of_item in enumerate(kinds) if of_item == kind]
        of_kind = micro_batches([lengths[i] for i in items], max_tokens=max_tokens)
        cuts += [[items[i] for i in cut] for cut in of_kind]
    return cuts


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
