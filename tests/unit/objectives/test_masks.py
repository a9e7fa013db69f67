"""Keep masks against literal loops, hand-made texts, and the same text cut into other tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.objectives.masks import matches_format, sequences_kept, special_tokens_kept, text_spans_kept


def keep_of(text: str) -> Tensor:
    """`x` masked, `.` kept."""
    return torch.tensor([character == "." for character in text], dtype=torch.bool)


def naive_special(ids: list[int], *, bounds: list[int], special_ids: list[int], first_only: bool) -> list[bool]:
    keep = [True] * len(ids)
    for start, end in itertools.pairwise(bounds):
        for special_id in special_ids:
            at = [t for t in range(start, end) if ids[t] == special_id]
            for t in at[:1] if first_only else at:
                keep[t] = False
    return keep


@given(
    rows=st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=4),
    special_ids=st.lists(st.integers(0, 5), max_size=3),
    first_only=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_special_tokens_are_masked_as_the_loop_masks_them(
    rows: list[list[int]], special_ids: list[int], first_only: bool
) -> None:
    ids = [token_id for row in rows for token_id in row]
    bounds = [0, *itertools.accumulate(map(len, rows))]
    ids_N = torch.tensor(ids, dtype=torch.int64)
    keep_N = special_tokens_kept(ids_N, offsets=torch.tensor(bounds), special_ids=special_ids, first_only=first_only)
    assert keep_N.dtype == torch.bool
    assert keep_N.tolist() == naive_special(ids, bounds=bounds, special_ids=special_ids, first_only=first_only)


def test_first_only_masks_the_first_of_each_special_id_in_each_row() -> None:
    ids_N = torch.tensor([7, 1, 8, 7, 8, 8, 2, 7, 7])
    offsets = torch.tensor([0, 5, 9])
    first_N = special_tokens_kept(ids_N, offsets=offsets, special_ids=[7, 8], first_only=True)
    every_N = special_tokens_kept(ids_N, offsets=offsets, special_ids=[7, 8], first_only=False)
    assert torch.equal(first_N, keep_of("x.x..x.x."))
    assert torch.equal(every_N, keep_of("x.xxxx.xx"))


THINK = [b"<think>", b"</think>"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"So", b"<think>", b"a", b"</think>", b"b"], ".x.x."),
        ([b"So", b"<", b"think", b">", b"a", b"</", b"think", b">", b"b"], ".xxx.xxx."),
        ([b"So<thi", b"nk>a<", b"/think>b"], "xxx"),
        ([b"So", b"<thi", b"", b"nk>", b"", b"a</think>", b"", b"b"], ".xxx.x.."),
        ([b"", b"<think", b"> ", b""], ".xx."),
        ([b"<think"], "."),
        ([], ""),
    ],
)
def test_every_token_that_shares_a_byte_with_a_span_is_masked(pieces: list[bytes], expected: str) -> None:
    keep_N = text_spans_kept(pieces, offsets=torch.tensor([0, len(pieces)]), spans=THINK)
    assert torch.equal(keep_N, keep_of(expected))


def masked_bytes(pieces: list[bytes], keep_N: Tensor) -> list[bool]:
    return [not keep for piece, keep in zip(pieces, keep_N.tolist(), strict=True) for _ in piece]


def test_three_segmentations_that_cut_at_the_spans_mask_the_same_bytes() -> None:
    segmentations = [
        [b"<think>", b"ab", b"</think>"],
        [b"<", b"think", b">", b"a", b"b", b"</", b"think", b">"],
        [bytes([byte]) for byte in b"<think>ab</think>"],
    ]
    masks = [
        masked_bytes(pieces, text_spans_kept(pieces, offsets=torch.tensor([0, len(pieces)]), spans=THINK))
        for pieces in segmentations
    ]
    assert masks == [[True] * 7 + [False] * 2 + [True] * 8] * 3


def test_a_span_never_matches_across_a_sequence_boundary() -> None:
    pieces = [b"<th", b"ink>", b"<th", b"ink>"]
    keep_N = text_spans_kept(pieces, offsets=torch.tensor([0, 1, 1, 2, 4]), spans=THINK)
    assert torch.equal(keep_N, keep_of("..xx"))


def test_a_span_at_a_boundary_leaves_the_empty_tokens_of_its_neighbours_alone() -> None:
    pieces = [b"a", b"", b"", b"ab", b"", b"", b"b"]
    keep_N = text_spans_kept(pieces, offsets=torch.tensor([0, 2, 5, 7]), spans=[b"ab"])
    assert torch.equal(keep_N, keep_of("...x..."))


def test_occurrences_of_one_span_do_not_overlap_but_different_spans_may() -> None:
    pieces = [b"a", b"b", b"a", b"b", b"a"]
    offsets = torch.tensor([0, 5])
    assert torch.equal(text_spans_kept(pieces, offsets=offsets, spans=[b"aba"]), keep_of("xxx.."))
    assert torch.equal(text_spans_kept(pieces, offsets=offsets, spans=[b"aba", b"bab"]), keep_of("xxxx."))
    assert torch.equal(text_spans_kept([b".", b"*"], offsets=torch.tensor([0, 2]), spans=[b"*"]), keep_of(".x"))
    assert torch.equal(text_spans_kept(pieces, offsets=offsets, spans=[]), keep_of("....."))


def naive_spans(pieces: list[bytes], *, bounds: list[int], spans: list[bytes]) -> list[bool]:
    """Walk over the bytes, each of which knows its token."""
    keep = [True] * len(pieces)
    for start, end in itertools.pairwise(bounds):
        owner = [t for t in range(start, end) for _ in pieces[t]]
        text = b"".join(pieces[start:end])
        for span in spans:
            at = text.find(span)
            while at >= 0:
                first, last = owner[at], owner[at + len(span) - 1]
                keep[first : last + 1] = [False] * (last + 1 - first)
                at = text.find(span, at + len(span))
    return keep


PIECES = st.lists(st.binary(max_size=3).map(lambda piece: bytes(97 + byte % 2 for byte in piece)), max_size=8)
SPANS = st.lists(st.sampled_from([b"a", b"ab", b"aba", b"bb", b"abba"]), max_size=3)


@given(rows=st.lists(PIECES, min_size=1, max_size=3), spans=SPANS)
@settings(max_examples=100, deadline=None)
def test_spans_are_masked_as_the_loop_over_bytes_masks_them(rows: list[list[bytes]], spans: list[bytes]) -> None:
    pieces = [piece for row in rows for piece in row]
    bounds = [0, *itertools.accumulate(map(len, rows))]
    keep_N = text_spans_kept(pieces, offsets=torch.tensor(bounds), spans=spans)
    assert keep_N.tolist() == naive_spans(pieces, bounds=bounds, spans=spans)


def test_empty_spans_and_missing_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        text_spans_kept([b"a"], offsets=torch.tensor([0, 1]), spans=[b"a", b""])
    with pytest.raises(ValueError, match="1 pieces"):
        text_spans_kept([b"a"], offsets=torch.tensor([0, 2]), spans=[b"a"])


def test_a_sequence_is_kept_or_masked_whole() -> None:
    keep_N = sequences_kept(torch.tensor([True, False, False, True]), offsets=torch.tensor([0, 2, 3, 3, 6]))
    assert torch.equal(keep_N, keep_of("..x..."))


def test_a_format_is_searched_anywhere_in_the_text() -> None:
    matches_B = matches_format(["so \\boxed{4}.", "4", ""], pattern=r"\\boxed\{.+\}")
    assert torch.equal(matches_B, torch.tensor([True, False, False]))
    assert matches_format([], pattern="a").shape == (0,)
    with pytest.raises(ValueError, match=r"'a\(' is no regular expression"):
        matches_format(["a"], pattern="a(")


def test_masks_compose_by_and() -> None:
    pieces = [b"<think>", b"a", b"<eos>", b"b", b"<eos>"]
    offsets = torch.tensor([0, 3, 5])
    spans_N = text_spans_kept(pieces, offsets=offsets, spans=THINK)
    special_N = special_tokens_kept(torch.tensor([1, 2, 9, 3, 9]), offsets=offsets, special_ids=[9], first_only=True)
    format_B = matches_format(["<think>a<eos>", "b<eos>"], pattern="a")
    keep_N = spans_N & special_N & sequences_kept(format_B, offsets=offsets)
    assert torch.equal(keep_N, keep_of("x.xxx"))
