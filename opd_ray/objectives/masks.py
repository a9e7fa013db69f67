"""Which sampled tokens count in the loss: one pure function per rule, combined by `&`.

Suffixes: N flat tokens of B sequences laid end to end, sequence b from offsets[b] to offsets[b+1] (offsets int64
[B+1], first 0, last N), K special ids. A keep mask is bool [N]; true: the token counts.
"""

import itertools
import re
from collections.abc import Sequence

import torch
from torch import Tensor


def special_tokens_kept(ids_N: Tensor, *, offsets: Tensor, special_ids: Sequence[int], first_only: bool) -> Tensor:
    """Return false at the tokens whose id is special, [N].

    first_only masks the first occurrence of each special id in each sequence and no later one (arXiv 2603.25562);
    otherwise every occurrence is masked.
    """
    num_tokens, num_sequences = len(ids_N), len(offsets) - 1
    special_K = torch.tensor(special_ids, dtype=torch.int64, device=ids_N.device)
    is_masked_KN = ids_N == special_K[:, None]
    if first_only:
        sequence_N = torch.repeat_interleave(offsets.diff(), output_size=num_tokens)
        sequence_KN = sequence_N.expand(len(special_K), -1)
        position_N = torch.arange(num_tokens, device=ids_N.device)
        position_KN = position_N.where(is_masked_KN, num_tokens)
        none_KB = position_N.new_full((len(special_K), num_sequences), num_tokens)
        first_KB = none_KB.scatter_reduce(1, sequence_KN, position_KN, "amin")
        is_masked_KN &= position_N == first_KB.gather(1, sequence_KN)
    return ~is_masked_KN.any(0)


def text_spans_kept(pieces: Sequence[bytes], *, offsets: Tensor, spans: Sequence[bytes]) -> Tensor:
    """Return false at the tokens that share a byte with a span's occurrence in the text of their sequence, [N].

    pieces [N] are the bytes that the tokens contribute to the text, so the mask is the same however the tokenizer cut
    a span, also where a token carries a part of the span together with other text. The occurrences of one span do not
    overlap and are found from left to right; each span is looked for on its own. A token without bytes is masked
    between two masked tokens of one occurrence. An empty span, or pieces and offsets of different lengths, raise
    ValueError.
    """
    bounds = offsets.tolist()
    if bounds[-1] != len(pieces):
        raise ValueError(f"{len(pieces)} pieces, expected one for each of the {bounds[-1]} tokens that offsets bound")
    if b"" in spans:
        raise ValueError(f"spans {list(spans)} hold an empty one, expected at least one byte in each")
    byte_ends_N = torch.tensor([0, *map(len, pieces)]).cumsum(0)[1:]
    first, last = _occurrences(pieces, bounds=bounds, spans=spans)
    steps = torch.zeros(len(pieces) + 1, dtype=torch.int64)
    steps.index_add_(0, torch.searchsorted(byte_ends_N, first, right=True), torch.ones_like(first))
    steps.index_add_(0, torch.searchsorted(byte_ends_N, last, right=True) + 1, -torch.ones_like(last))
    return (steps.cumsum(0)[:-1] == 0).to(offsets.device)


def _occurrences(pieces: Sequence[bytes], *, bounds: list[int], spans: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Return the first and the last byte of every occurrence, int64 [number found], counted over all sequences."""
    patterns = [re.compile(re.escape(span)) for span in spans]
    found: list[tuple[int, int]] = []
    start = 0
    for begin, end in itertools.pairwise(bounds):
        text = b"".join(pieces[begin:end])
        found += [(start + m.start(), start + m.end() - 1) for pattern in patterns for m in pattern.finditer(text)]
        start += len(text)
    first, last = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return first.contiguous(), last.contiguous()


def sequences_kept(keep_B: Tensor, *, offsets: Tensor) -> Tensor:
    """Return to each token the decision keep_B [B] of its sequence, [N]: truncated, of a wrong format."""
    return torch.repeat_interleave(keep_B, offsets.diff())


def matches_format(text_B: Sequence[str], *, pattern: str) -> Tensor:
    """Return whether the pattern is found anywhere in each text, bool [B]; a bad pattern raises ValueError."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"format pattern {pattern!r} is no regular expression: {error}") from error
    return torch.tensor([compiled.search(text) is not None for text in text_B], dtype=torch.bool)
