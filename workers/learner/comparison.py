"""Collects a rank's part of the comparison of student and teacher, micro-batch by micro-batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from opd_ray.comparison import Alternatives, Comparison, TokenPoints, TokenTrace
from opd_ray.data.token_text import token_bytes
from opd_ray.objectives import Losses
from workers.learner.inputs import ScoredSequence

_NUM_TRACES, _TRACED_TOKENS = 2, 512  # of a rank and task, to different prompts; of a response
_MEANS = (
    "student_entropy",
    "teacher_entropy",
    "topk_overlap",
    "student_mass_in_teacher_topk",
    "teacher_mass_in_student_topk",
)


@dataclass(slots=True, kw_only=True)
class Comparer:
    """Adds up micro-batches of `comparison`, or of `sampled` where the teacher gave no hidden states."""

    stride: int  # one token in so many becomes a point
    text_of: Callable[[Sequence[int]], str]
    text_of_token: Callable[[int], str]
    _kl_sum: float = 0.0
    _num_tokens: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _points: list[tuple[Any, ...]] = field(default_factory=list)
    _traces: list[TokenTrace] = field(default_factory=list)

    def add(self, losses: Losses, sequences: Sequence[ScoredSequence]) -> None:
        """Add a micro-batch; tokens that are not kept are left out."""
        kept = np.concatenate([s.kept for s in sequences])
        student = _numbers(losses.sampled_logprobs_N)
        known = losses.stats.get("teacher_logprob")
        teacher = student - _numbers(losses.divergence_N) if known is None else _numbers(known)
        self._kl_sum += float(losses.divergence_N.sum())
        sums = {name: float(losses.stats[name].sum()) for name in _MEANS if name in losses.stats}
        sums["negative_reward_fraction"] = float((teacher < student)[kept].sum())
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        positions = np.concatenate([np.arange(len(s.response_ids)) for s in sequences])
        ids = np.concatenate([s.response_ids for s in sequences])
        first = -self._num_tokens % self.stride
        chosen = np.flatnonzero(kept)[first :: self.stride]
        weights = np.full(len(chosen), self.stride)
        self._points.append((ids[chosen], positions[chosen], student[chosen], teacher[chosen], weights))
        self._num_tokens += int(kept.sum())
        self._trace(losses, sequences, student=student, teacher=teacher)

    def result(self) -> Comparison:
        """Return what was collected."""
        columns = (np.concatenate(column) for column in zip(*self._points, strict=True))
        ids, positions, student, teacher, weights = columns
        return Comparison(
            kl_sum=self._kl_sum,
            num_tokens=self._num_tokens,
            sums=self._sums,
            points=TokenPoints(
                ids_M=ids.astype(np.int32),
                positions_M=positions.astype(np.int32),
                student_logprobs_M=student.astype(np.float32),
                teacher_logprobs_M=teacher.astype(np.float32),
                weights_M=weights.astype(np.float32),
            ),
            token_texts={int(id_): self.text_of_token(int(id_)) for id_ in np.unique(ids)},
            traces=tuple(self._traces),
        )

    def _trace(self, losses: Losses, sequences: Sequence[ScoredSequence], *, student: Any, teacher: Any) -> None:
        start = 0
        for sequence in sequences:
            end = start + len(sequence.response_ids)
            prompt = self.text_of(sequence.prompt_ids.tolist()) if len(self._traces) < _NUM_TRACES else ""
            if prompt and sequence.kept.all() and prompt not in (known.prompt for known in self._traces):
                rows = slice(start, min(end, start + _TRACED_TOKENS))
                ids = sequence.response_ids[:_TRACED_TOKENS].tolist()
                self._traces.append(
                    TokenTrace(
                        prompt=prompt,
                        tokens=tuple(map(self.text_of_token, ids)),
                        student_logprobs=tuple(student[rows].tolist()),
                        teacher_logprobs=tuple(teacher[rows].tolist()),
                        student_top=self._alternatives(losses, "student", rows),
                        teacher_top=self._alternatives(losses, "teacher", rows),
                    )
                )
            start = end

    def _alternatives(self, losses: Losses, whose: str, rows: slice) -> tuple[Alternatives, ...]:
        if f"{whose}_top_ids" not in losses.stats:
            return ()
        ids_NA = losses.stats[f"{whose}_top_ids"][rows].tolist()
        logprobs_NA = losses.stats[f"{whose}_top_logprobs"][rows].tolist()
        return tuple(
            tuple((self.text_of_token(id_), logprob) for id_, logprob in zip(ids, logprobs, strict=True))
            for ids, logprobs in zip(ids_NA, logprobs_NA, strict=True)
        )


def texts_of_tokens(tokenizer: Any) -> Callable[[int], str]:
    """Return what each id contributes to a text, its leading space included; a part of a character as `\\xe4`.

    Of a tokenizer whose tokens have no bytes of their own, the text of the id alone.
    """
    try:
        pieces = token_bytes(tokenizer)
    except ValueError:
        return lambda id_: str(tokenizer.decode([id_]))

    def text(id_: int) -> str:
        piece = pieces[id_] if id_ < len(pieces) else b""
        return piece.decode(errors="backslashreplace") or f"<{id_}>"

    return text


def stride_of(num_tokens: int, *, max_points: int) -> int:
    """Return the distance of points that gives no more than so many of the tokens."""
    return max(1, math.ceil(num_tokens / max_points))


def _numbers(values_N: Tensor) -> Any:
    return values_N.float().cpu().numpy()
