"""Spans of a text that begin and end at a token of either of two tokenizers.

Array suffixes: N tokens of a text (the student's, where there are two), M teacher tokens, S spans, B symbols of a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opd_ray.protocol import Int32

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

Piece = bytes | int
"""What a token contributes to a text: its bytes; or the number of a unit, a token that has a counterpart in the other
tokenizer and matches it, and nothing else, whatever the bytes of either."""

_NUM_BYTES = 256
_SHOWN_BEFORE, _SHOWN_AFTER = 12, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A text, and the part of it that each of a sequence of tokens stands for."""

    symbols_B: Int32  # the text: the value of a byte, or 256 + the number of a unit
    starts_N: Int64  # [N] first symbol of the token; a token without bytes stands between two symbols
    ends_N: Int64  # [N] the symbol after its last; no later than the next token's start

    def __post_init__(self) -> None:
        if self.starts_N.shape != self.ends_N.shape or self.ends_N.ndim != 1:
            raise ValueError(f"TokenText: starts {self.starts_N.shape}, ends {self.ends_N.shape}, expected [N] twice")
        edges = np.stack([self.starts_N, self.ends_N], axis=1).ravel()
        if (np.diff(edges, prepend=0, append=len(self.symbols_B)) < 0).any():
            raise ValueError(f"TokenText: tokens overlap or leave the text of {len(self.symbols_B)} symbols")

    @staticmethod
    def of(pieces: Sequence[Piece]) -> "TokenText":
        """Lay pieces end to end."""
        is_unit = np.array([isinstance(piece, int) for piece in pieces], dtype=np.bool_)
        laid = [b"\0" if isinstance(piece, int) else piece for piece in pieces]
        ends_N = np.cumsum([len(piece) for piece in laid], dtype=np.int64)
        symbols_B = np.frombuffer(b"".join(laid), dtype=np.uint8).astype(np.int32)
        units = np.array([piece for piece in pieces if isinstance(piece, int)], dtype=np.int32)
        symbols_B[ends_N[is_unit] - 1] = _NUM_BYTES + units
        return TokenText(symbols_B=symbols_B, starts_N=np.append(0, ends_N)[:-1], ends_N=ends_N)

    def bounds(self) -> Int64:
        """Return where in the text a token may begin or end, ascending."""
        return np.unique(np.concatenate([[0, len(self.symbols_B)], self.starts_N, self.ends_N]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The span of each token. Spans are numbered as they come in the text; each has a student token."""

    student_spans_N: Int32  # [N] ascending, from 0 to S-1
    teacher_spans_M: Int32  # [M] ascending
    covered_S: Bool  # [S] false: not all of the span has a teacher token, so the teacher has no log-prob of it

    def __post_init__(self) -> None:
        num_spans = len(self.covered_S)
        if not np.array_equal(np.unique(self.student_spans_N), np.arange(num_spans)):
            raise ValueError(f"Alignment: not each of {num_spans} spans has a student token, expected one in each")
        for name in ("student_spans_N", "teacher_spans_M"):
            spans = getattr(self, name)
            if (np.diff(spans, prepend=0, append=max(num_spans - 1, 0)) < 0).any() or (len(spans) and not num_spans):
                raise ValueError(f"Alignment.{name}: expected ascending spans below {num_spans}")

    @staticmethod
    def joined(parts: Sequence["Alignment"]) -> "Alignment":
        """Return the alignment of several texts laid end to end; no span reaches over the end of a text."""
        first = np.cumsum([0, *(len(part.covered_S) for part in parts)])
        empty: list[Int32] = [np.empty(0, dtype=np.int32)]
        student = empty + [part.student_spans_N + n for part, n in zip(parts, first, strict=False)]
        teacher = empty + [part.teacher_spans_M + n for part, n in zip(parts, first, strict=False)]
        return Alignment(
            student_spans_N=np.concatenate(student).astype(np.int32),
            teacher_spans_M=np.concatenate(teacher).astype(np.int32),
            covered_S=np.concatenate([np.empty(0, dtype=np.bool_), *(part.covered_S for part in parts)]),
        )


def align(student: TokenText, teacher: TokenText) -> Alignment:
    """Cut a text wherever a student token and a teacher token may both begin or end; return the span of each token.

    A unit is a span of its own. A token without bytes belongs to the span that begins where it stands, at the text's
    end to the last one; a text without bytes is one span if it has a student token. Teacher tokens may leave parts of
    the text out: the span over such a part is not covered. Student tokens that do so, and different texts, raise
    ValueError.
    """
    _check_same_text(student.symbols_B, teacher.symbols_B)
    size = len(student.symbols_B)
    if (student.ends_N - student.starts_N).sum() != size:
        raise ValueError(f"student tokens leave out a part of their text of {size} symbols, expected them to cover it")
    bounds = np.intersect1d(student.bounds(), teacher.bounds(), assume_unique=True)
    ends_S = bounds[1:] if size else bounds[: len(student.ends_N) + len(teacher.ends_N)]
    spans_M = _spans(teacher, ends_S=ends_S)
    num_covered_S = np.bincount(spans_M, weights=teacher.ends_N - teacher.starts_N, minlength=len(ends_S))
    has_teacher_S = np.bincount(spans_M, minlength=len(ends_S)) > 0
    return Alignment(
        student_spans_N=_spans(student, ends_S=ends_S),
        teacher_spans_M=spans_M,
        covered_S=has_teacher_S & (num_covered_S == np.diff(ends_S, prepend=0)),
    )


def _spans(text: TokenText, *, ends_S: Int64) -> Int32:
    spans = np.searchsorted(ends_S, text.starts_N, side="right")
    return np.minimum(spans, len(ends_S) - 1).astype(np.int32)


def _check_same_text(student_B: Int32, teacher_B: Int32) -> None:
    if np.array_equal(student_B, teacher_B):
        return
    num_common = min(len(student_B), len(teacher_B))
    differs = np.append(student_B[:num_common] != teacher_B[:num_common], True)
    first = int(differs.argmax())
    raise ValueError(
        f"the texts of student and teacher differ from byte {first} on (a mapped token counts as one):"
        f" {_shown(student_B, first)} to the student, {_shown(teacher_B, first)} to the teacher"
    )


def _shown(symbols_B: Int32, place: int) -> str:
    """Return the text around a place, for people."""
    window = symbols_B[max(place - _SHOWN_BEFORE, 0) : place + _SHOWN_AFTER].tolist()
    parts = [bytes([s]) if s < _NUM_BYTES else f"[token {s - _NUM_BYTES}]".encode() for s in window]
    return repr(b"".join(parts).decode(errors="backslashreplace"))
