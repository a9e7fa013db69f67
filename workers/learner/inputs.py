"""Turns groups and scores into what the student's forward pass takes.

Suffixes: N flat response tokens of a micro-batch, K support, D hidden size of the teacher, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from opd_ray.data.packing import PackedBatch, PaddedBatch, pack, pad
from opd_ray.objectives import HiddenSignal, SampledSignal, Signal, SupportSignal, Tokens
from opd_ray.protocol import Float32, HiddenScore, Int32, SampledScore, Score, SupportScore, TrajectoryGroup
from workers.learner.attention import PackedLayout
from workers.learner.objective import TokenPlan
from workers.support_codec import support_ids

NO_ID = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSequence:
    """One trajectory, its part of the group's score and how much its tokens count: views, not copies."""

    prompt_ids: Int32  # [P]
    response_ids: Int32  # [n]
    sampled_logprobs: Float32  # [n]
    token_versions: Int32  # [n]
    kept: npt.NDArray[np.bool_]  # [n]
    weights: Float32  # [n]
    advantages: Float32  # [n]
    score: Score  # of these n tokens
    teacher: str  # whose
    task: str

    def without_loss(self) -> "ScoredSequence":
        """Return the same sequence with every token masked."""
        return replace(self, kept=np.zeros_like(self.kept))


def split_groups(
    groups: Sequence[TrajectoryGroup], scores: Sequence[Score], plan: TokenPlan, *, teachers: Sequence[str]
) -> list[ScoredSequence]:
    """Return the trajectories of all groups, in order; teachers names the one that scored each group."""
    sequences, first = [], 0
    for group, score, teacher in zip(groups, scores, teachers, strict=True):
        for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True):
            of_plan = slice(first + start, first + end)
            sequences.append(
                ScoredSequence(
                    prompt_ids=group.prompt_ids,
                    response_ids=group.response_ids[start:end],
                    sampled_logprobs=group.sampled_logprobs[start:end],
                    token_versions=group.token_versions[start:end],
                    kept=plan.kept_N[of_plan].numpy(),
                    weights=plan.weights_N[of_plan].numpy(),
                    advantages=plan.advantages_N[of_plan].numpy(),
                    score=_rows(score, slice(start, end)),
                    teacher=teacher,
                    task=group.task,
                )
            )
        first += len(group.response_ids)
    return sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBuilder:
    """Builds the student's inputs on a rank."""

    device: torch.device
    teacher_heads: Mapping[str, torch.Tensor]  # by teacher, each [V,D]
    removed_ids: tuple[int, ...]  # never in a support
    packing: bool  # sequences end to end, else padded

    def build(self, sequences: Sequence[ScoredSequence]) -> dict[str, Any]:
        """Return the keyword arguments of `Student.forward` that speak of tokens and of their one teacher."""
        texts = [s.prompt_ids for s in sequences], [s.response_ids for s in sequences]
        batch = pack(*texts) if self.packing else pad(*texts)
        return {
            "sequences": self._sequences(batch),
            "state_rows_N": self._tensor(batch.state_rows_N),
            "tokens": Tokens(
                ids_N=self._tensor(batch.response_ids_N),
                offsets=self._tensor(batch.offsets),
                mask_N=self._joined(sequences, "kept"),
                weights_N=self._joined(sequences, "weights"),
                sampler_logprobs_N=self._joined(sequences, "sampled_logprobs"),
                advantages_N=self._joined(sequences, "advantages"),
            ),
            "signal": self._signal([s.score for s in sequences], teacher=sequences[0].teacher),
        }

    def _sequences(self, batch: PackedBatch | PaddedBatch) -> dict[str, Any]:
        if isinstance(batch, PaddedBatch):
            return {
                "input_ids": self._tensor(batch.input_ids_BT),
                "attention_mask": self._tensor(batch.attention_mask_BT),
            }
        return {
            "input_ids": self._tensor(batch.input_ids_T[None]),
            "position_ids": self._tensor(batch.position_ids_T[None]),
            "packing": PackedLayout.of(batch.lengths, device=self.device),
        }

    def _signal(self, scores: Sequence[Any], *, teacher: str) -> Signal:
        """Concatenate the scores of a micro-batch, all of one kind, into a teacher signal."""
        match scores[0]:
            case SampledScore():
                return SampledSignal(logprobs_N=self._joined(scores, "logprobs_N"))
            case SupportScore():
                ids_NK = self._tensor(np.concatenate([support_ids(score) for score in scores])).long()
                for id_ in self.removed_ids:
                    ids_NK = ids_NK.masked_fill(ids_NK == id_, NO_ID)
                return SupportSignal(
                    ids_NK=ids_NK,
                    logprobs_NK=self._joined(scores, "logprobs_NK"),
                    sampled_logprobs_N=self._joined(scores, "sampled_logprobs_N"),
                )
            case _:
                hidden_ND = self._joined(scores, "hidden_ND")
                bits = hidden_ND.dtype is torch.uint16
                return HiddenSignal(
                    hidden_ND=hidden_ND.view(torch.bfloat16) if bits else hidden_ND, head_VD=self.teacher_heads[teacher]
                )

    def _joined(self, parts: Sequence[Any], name: str) -> torch.Tensor:
        return self._tensor(np.concatenate([getattr(part, name) for part in parts]))

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _rows(score: Score, rows: slice) -> Score:
    match score:
        case SampledScore():
            return SampledScore(logprobs_N=score.logprobs_N[rows], valid_N=score.valid_N[rows])
        case SupportScore():
            return SupportScore(
                low_ids_NK=score.low_ids_NK[rows],
                page_starts_NH=score.page_starts_NH[rows],
                logprobs_NK=score.logprobs_NK[rows],
                sampled_logprobs_N=score.sampled_logprobs_N[rows],  # of nothing, when there are none
            )
        case HiddenScore():
            return HiddenScore(hidden_ND=score.hidden_ND[rows], sampled_logprobs_N=score.sampled_logprobs_N[rows])
