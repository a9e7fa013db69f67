"""Turns groups and scores into what the student's forward pass takes.

Suffixes: N flat response tokens of a micro-batch, K support, D hidden size of the teacher, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from opd_ray.data.packing import pad
from opd_ray.objectives import HiddenSignal, SampledSignal, SupportSignal, Tokens
from opd_ray.protocol import Float32, HiddenScore, Int32, SampledScore, Score, SupportScore, TrajectoryGroup

Signal = SampledSignal | SupportSignal | HiddenSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSequence:
    """One trajectory and its part of the group's score: views, not copies."""

    prompt_ids: Int32  # [P]
    response_ids: Int32  # [n]
    sampled_logprobs: Float32  # [n]
    token_versions: Int32  # [n]
    loss_mask: npt.NDArray[np.bool_]  # [n]
    score: Score  # of these n tokens

    def without_loss(self) -> "ScoredSequence":
        """Return the same sequence with every token masked."""
        return replace(self, loss_mask=np.zeros_like(self.loss_mask))


def split_groups(groups: Sequence[TrajectoryGroup], scores: Sequence[Score]) -> list[ScoredSequence]:
    """Return the trajectories of all groups, in order."""
    return [
        ScoredSequence(
            prompt_ids=group.prompt_ids,
            response_ids=group.response_ids[start:end],
            sampled_logprobs=group.sampled_logprobs[start:end],
            token_versions=group.token_versions[start:end],
            loss_mask=group.loss_mask[start:end],
            score=_rows(score, slice(start, end)),
        )
        for group, score in zip(groups, scores, strict=True)
        for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True)
    ]


def build_inputs(
    sequences: Sequence[ScoredSequence], *, device: torch.device, teacher_head_VD: torch.Tensor
) -> dict[str, Any]:
    """Return the keyword arguments of `Student.forward` that speak of tokens and of the teacher."""
    batch = pad([s.prompt_ids for s in sequences], [s.response_ids for s in sequences])
    mask_N = np.concatenate([s.loss_mask for s in sequences])
    return {
        "input_ids_BT": torch.from_numpy(batch.input_ids_BT).to(device),
        "attention_mask_BT": torch.from_numpy(batch.attention_mask_BT).to(device),
        "state_rows_N": torch.from_numpy(batch.state_rows_N).to(device),
        "tokens": Tokens(
            ids_N=torch.from_numpy(batch.response_ids_N).to(device),
            offsets=torch.from_numpy(batch.offsets).to(device),
            mask_N=torch.from_numpy(mask_N).to(device),
        ),
        "signal": _signal([s.score for s in sequences], device=device, teacher_head_VD=teacher_head_VD),
    }


def _rows(score: Score, rows: slice) -> Score:
    match score:
        case SampledScore():
            return SampledScore(logprobs_N=score.logprobs_N[rows])
        case SupportScore():
            return SupportScore(ids_NK=score.ids_NK[rows], logprobs_NK=score.logprobs_NK[rows])
        case HiddenScore():
            return HiddenScore(hidden_ND=score.hidden_ND[rows])


def _signal(scores: Sequence[Any], *, device: torch.device, teacher_head_VD: torch.Tensor) -> Signal:
    """Concatenate the scores of a micro-batch, all of one kind, into a teacher signal."""

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(score, name) for score in scores])).to(device)

    match scores[0]:
        case SampledScore():
            return SampledSignal(logprobs_N=joined("logprobs_N"))
        case SupportScore():
            return SupportSignal(ids_NK=joined("ids_NK").long(), logprobs_NK=joined("logprobs_NK"))
        case _:
            hidden_ND = joined("hidden_ND")
            bits = hidden_ND.dtype is torch.uint16
            return HiddenSignal(
                hidden_ND=hidden_ND.view(torch.bfloat16) if bits else hidden_ND, head_VD=teacher_head_VD
            )
