"""Lets a teacher with another tokenizer score what the student wrote.

Suffixes as in the protocol: N flat response tokens of a group, G its samples; M flat response tokens of the teacher.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_ray.data.alignment import Alignment, Piece, TokenText, align
from opd_ray.data.rereading import TextReader
from opd_ray.data.span_logprobs import SpreadLogprobs, spread
from opd_ray.data.token_text import token_bytes
from opd_ray.protocol import Float32, Int32, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherGroup:
    """A group in the teacher's tokens. The prompt's end is the end of a token."""

    prompt_ids: Int32
    response_ids: Int32  # [M]
    offsets: Int32  # [G+1] response g is response_ids[offsets[g]:offsets[g+1]]
    alignment: Alignment  # of the N student tokens and the M teacher tokens

    def __post_init__(self) -> None:
        num_tokens = len(self.response_ids)
        if self.offsets[-1] != num_tokens or len(self.alignment.teacher_spans_M) != num_tokens:
            raise ValueError(
                f"TeacherGroup: {num_tokens} ids, offsets to {self.offsets[-1]} and an alignment of"
                f" {len(self.alignment.teacher_spans_M)} tokens, expected equal counts"
            )

    def to_student(self, logprobs_M: Float32, *, group: TrajectoryGroup) -> SpreadLogprobs:
        """Turn the teacher's log-probs of its response tokens into those of the student's, see `spread`."""
        return spread(
            logprobs_M,
            alignment=self.alignment,
            sampled_logprobs_N=group.sampled_logprobs,
            loss_mask_N=group.loss_mask,
        )


class ByteAligner:
    """Puts the student's groups into the teacher's tokens.

    Tokens of token_map, and special tokens that both tokenizers have, become the teacher's counterpart one for one;
    all other tokens are text, and the teacher's tokenizer reads it anew. Between tokenizers with one token map every
    token has its counterpart, so ids and log-probs pass unchanged, also of text that the student cut in its own way.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any, *, token_map: Mapping[str, str]) -> None:
        """Raise ValueError for names that are no tokens, and where the student's end token has no counterpart.

        token_map: text of a student token -> text of the teacher token that means the same. Several student tokens may
        have one counterpart.
        """
        units = _counterparts(student_tokenizer, teacher_tokenizer, token_map=token_map)
        self._pieces: list[Piece] = [*token_bytes(student_tokenizer)]
        for id_, teacher_id in units.items():
            self._pieces[id_] = teacher_id
        self._reader = TextReader(teacher_tokenizer)

    def to_teacher(self, group: TrajectoryGroup) -> TeacherGroup:
        """Return the group in the teacher's tokens. Raises ValueError where the teacher's tokenizer refuses the text.

        A prompt or a response may have another number of tokens there, so the teacher's limit is to be checked on it.
        """
        prompt = self._reader.read(self._pieces_of(group.prompt_ids))
        if not len(prompt.ids):
            raise ValueError(f"prompt {group.prompt_index} has no token to the teacher, expected at least one")
        responses = [group.response_ids[a:b] for a, b in itertools.pairwise(group.offsets)]
        written = [self._pieces_of(response) for response in responses]
        readings = [self._reader.read(pieces) for pieces in written]
        parts = [align(TokenText.of(p), reading.text) for p, reading in zip(written, readings, strict=True)]
        return TeacherGroup(
            prompt_ids=prompt.ids,
            response_ids=np.concatenate([reading.ids for reading in readings]),
            offsets=np.cumsum([0, *(len(reading.ids) for reading in readings)], dtype=np.int32),
            alignment=Alignment.joined(parts),
        )

    def _pieces_of(self, ids: Int32) -> list[Piece]:
        """Return the pieces of tokens; an id of a padded row names no token and has no bytes."""
        return [self._pieces[id_] if id_ < len(self._pieces) else b"" for id_ in ids.tolist()]


def _counterparts(student: Any, teacher: Any, *, token_map: Mapping[str, str]) -> dict[int, int]:
    """Return the teacher's id for every student id that has a counterpart."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    for side, tokens, vocabulary in (
        ("student", token_map.keys(), student_ids),
        ("teacher", token_map.values(), teacher_ids),
    ):
        for token in tokens:
            if token not in vocabulary:
                raise ValueError(
                    f"teacher.token_map names {token!r}, which is no token of the {side}'s vocabulary; expected"
                    " <student token>: <teacher token>"
                )
    is_same = student_ids == teacher_ids
    names = set(student_ids) if is_same else _special_tokens(student) & _special_tokens(teacher)
    counterparts = {name: name for name in names} | dict(token_map)
    if student.eos_token is not None and student.eos_token not in counterparts:
        raise ValueError(
            f"the student's end token {student.eos_token!r} is unknown to the teacher, which would read it as text; add"
            f" it to teacher.token_map with the teacher's (its own is {teacher.eos_token!r})"
        )
    return {student_ids[name]: teacher_ids[counterpart] for name, counterpart in counterparts.items()}


def _special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
