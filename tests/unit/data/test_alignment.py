"""Spans against their definition, on arbitrary cuts and on two real tokenizers of one text."""

import itertools
import pickle

import numpy as np
import pytest
from alignment_tokenizers import CORPUS, STUDENT, TEACHER, TEXTS, ids_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opd_ray.data.alignment import Alignment, Piece, TokenText, align
from opd_ray.data.token_text import token_bytes

TABLES = [(tokenizer, token_bytes(tokenizer)) for tokenizer in (STUDENT, TEACHER)]
SYMBOLS = st.lists(st.one_of(st.integers(0, 255).map(lambda b: bytes([b])), st.integers(0, 9)), max_size=24)


@st.composite
def cuts(draw: st.DrawFn, symbols: list[Piece]) -> list[Piece]:
    """Join neighbouring bytes to pieces at random, with pieces of no bytes here and there."""
    pieces: list[Piece] = []
    for symbol in symbols:
        if draw(st.booleans()) and pieces and isinstance(pieces[-1], bytes) and isinstance(symbol, bytes):
            pieces[-1] += symbol
        else:
            pieces += [b""] * draw(st.integers(0, 1)) + [symbol]
    return pieces + [b""] * draw(st.integers(0, 1) if symbols else st.just(0))


TWO_CUTS = SYMBOLS.flatmap(lambda symbols: st.tuples(cuts(symbols), cuts(symbols)))


def ends(pieces: list[Piece]) -> list[int]:
    return list(itertools.accumulate(1 if isinstance(piece, int) else len(piece) for piece in pieces))


def laid(pieces: list[Piece]) -> list[Piece]:
    """The text itself: bytes one by one, and units."""
    return [s for piece in pieces for s in ([piece] if isinstance(piece, int) else [bytes([b]) for b in piece])]


def in_span(pieces: list[Piece], spans: np.ndarray, span: int) -> list[Piece]:
    return laid([piece for piece, of_piece in zip(pieces, spans, strict=True) if of_piece == span])


def read(text: str) -> list[list[Piece]]:
    return [[table[id_] for id_ in ids_of(tokenizer, text)] for tokenizer, table in TABLES]


def check_spans(student: list[Piece], teacher: list[Piece]) -> Alignment:
    alignment = align(TokenText.of(student), TokenText.of(teacher))
    common = sorted((set(ends(student)) & set(ends(teacher))) - {0})
    span_texts = [in_span(student, alignment.student_spans_N, span) for span in range(len(alignment.covered_S))]
    assert list(itertools.accumulate(map(len, span_texts))) == common
    assert span_texts == [in_span(teacher, alignment.teacher_spans_M, span) for span in range(len(common))]
    assert [s for text in span_texts for s in text] == laid(student) == laid(teacher)
    assert alignment.covered_S.all()
    return alignment


@given(pieces=TWO_CUTS)
@settings(deadline=None)
def test_spans_end_at_exactly_the_common_offsets_and_hold_the_same_text_on_both_sides(
    pieces: tuple[list[Piece], list[Piece]],
) -> None:
    check_spans(*pieces)


@given(text=TEXTS)
@example(text="".join(CORPUS[:5]) + "🙂")
@settings(max_examples=60, deadline=None)
def test_spans_of_two_real_tokenizers(text: str) -> None:
    student, teacher = read(text)
    check_spans(student, teacher)


def test_the_two_real_tokenizers_cut_across_each_other() -> None:
    text = "".join(CORPUS[:5])
    student, teacher = read(text)
    alignment = check_spans(student, teacher)
    sizes = zip(np.bincount(alignment.student_spans_N), np.bincount(alignment.teacher_spans_M), strict=True)
    assert {(1, 1), (2, 1), (2, 2)} <= set(sizes)


@given(text=TEXTS)
@settings(max_examples=30, deadline=None)
def test_equal_tokenizers_give_one_span_to_each_token(text: str) -> None:
    pieces, _ = read(text)
    alignment = check_spans(pieces, pieces)
    assert alignment.student_spans_N.tolist() == alignment.teacher_spans_M.tolist() == list(range(len(pieces)))


def test_spans_of_a_text_are_as_one_would_draw_them() -> None:
    alignment = align(
        TokenText.of([b"the", b" ca", b"t", b"!", b"?"]), TokenText.of([b"t", b"he", b" c", b"at", b"!?"])
    )
    assert alignment.student_spans_N.tolist() == [0, 1, 1, 2, 2]
    assert alignment.teacher_spans_M.tolist() == [0, 0, 1, 1, 2]


def test_a_unit_is_a_span_of_its_own_and_is_no_byte() -> None:
    alignment = align(TokenText.of([b"a", b"b", 7, b"c"]), TokenText.of([b"ab", 7, b"c"]))
    assert alignment.student_spans_N.tolist() == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="differ from byte 0 on"):
        align(TokenText.of([7]), TokenText.of([b"\x07"]))


def test_a_token_without_bytes_belongs_to_the_span_that_begins_where_it_stands() -> None:
    alignment = align(TokenText.of([b"", b"a", b"", b"b", b"c", b""]), TokenText.of([b"a", b"", b"bc", b""]))
    assert alignment.student_spans_N.tolist() == [0, 0, 1, 1, 1, 1]
    assert alignment.teacher_spans_M.tolist() == [0, 1, 1, 1]


def test_an_empty_text_has_no_span_and_tokens_without_bytes_have_one_that_is_not_covered() -> None:
    empty = align(TokenText.of([]), TokenText.of([]))
    assert (len(empty.student_spans_N), len(empty.teacher_spans_M), len(empty.covered_S)) == (0, 0, 0)
    nameless = align(TokenText.of([b"", b""]), TokenText.of([]))
    assert nameless.student_spans_N.tolist() == [0, 0]
    assert nameless.covered_S.tolist() == [False]


def test_a_span_over_text_that_the_teacher_leaves_out_is_not_covered() -> None:
    student = TokenText.of([b"ab", b"cd", b"e", b"f"])
    starts, ends_ = np.array([0, 3, 3, 4]), np.array([2, 3, 4, 5])  # no token for `c` and for `f`
    alignment = align(student, TokenText(symbols_B=student.symbols_B, starts_N=starts, ends_N=ends_))
    assert alignment.student_spans_N.tolist() == [0, 1, 2, 3]
    assert alignment.teacher_spans_M.tolist() == [0, 1, 1, 2]
    assert alignment.covered_S.tolist() == [True, False, True, False]


def test_texts_that_differ_are_named_at_the_first_byte_that_does() -> None:
    with pytest.raises(ValueError, match=r"from byte 21 on .*: '12, the größte 1' to the student, '12, the grö to"):
        align(TokenText.of(["So it is 12, the größte 1".encode()]), TokenText.of(["So it is 12, the grö to".encode()]))
    with pytest.raises(ValueError, match=r"from byte 1 on .*: 'a\[token 3\]' to the student, 'a' to the teacher"):
        align(TokenText.of([b"a", 3]), TokenText.of([b"a"]))


def test_tokens_that_overlap_or_leave_the_text_are_refused() -> None:
    symbols = np.arange(4, dtype=np.int32)
    for starts, ends_ in (([0, 1], [2, 4]), ([0], [5]), ([-1], [2]), ([3], [2])):
        with pytest.raises(ValueError, match="overlap or leave the text of 4 symbols"):
            TokenText(symbols_B=symbols, starts_N=np.array(starts), ends_N=np.array(ends_))
    with pytest.raises(ValueError, match=r"expected \[N\] twice"):
        TokenText(symbols_B=symbols, starts_N=np.array([0]), ends_N=np.array([1, 2]))
    half = TokenText(symbols_B=symbols, starts_N=np.array([0]), ends_N=np.array([2]))
    with pytest.raises(ValueError, match="expected them to cover it"):
        align(half, half)


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [
        ([0, 2], [0, 1, 2], "not each of 3 spans has a student token"),
        ([0, 1, 3, 2], [0], "not each of 3 spans has a student token"),
        ([1, 0, 2], [0, 1, 2], "student_spans_N: expected ascending spans below 3"),
        ([0, 1, 2], [0, 3], "teacher_spans_M: expected ascending spans below 3"),
        ([0, 1, 2], [-1, 0], "teacher_spans_M: expected ascending spans below 3"),
    ],
)
def test_an_alignment_that_is_none_is_refused(student: list[int], teacher: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Alignment(
            student_spans_N=np.array(student, dtype=np.int32),
            teacher_spans_M=np.array(teacher, dtype=np.int32),
            covered_S=np.ones(3, dtype=np.bool_),
        )


def test_texts_laid_end_to_end_keep_their_spans_apart() -> None:
    first = align(TokenText.of([b"a", b""]), TokenText.of([b"a"]))
    second = align(TokenText.of([b"b", b"c"]), TokenText.of([b"bc"]))
    nothing = align(TokenText.of([]), TokenText.of([]))
    joined = Alignment.joined([first, nothing, second])
    assert joined.student_spans_N.tolist() == [0, 0, 1, 1]
    assert joined.teacher_spans_M.tolist() == [0, 1]
    assert len(Alignment.joined([]).student_spans_N) == 0
    arrays = (joined.student_spans_N, joined.teacher_spans_M)
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays)


def test_an_alignment_passes_through_pickle() -> None:
    alignment = align(TokenText.of([b"a", b"b"]), TokenText.of([b"ab"]))
    again = pickle.loads(pickle.dumps(alignment))  # noqa: S301
    assert again.student_spans_N.tolist() == [0, 0]
