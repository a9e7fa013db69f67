"""Puts what a teacher's head says into the message of a payload."""

from typing import Any

import torch
from torch import Tensor

from opd_ray.protocol import Float32, HiddenScore, Payload, SampledScore, Score, SupportScore
from workers.support_codec import pack_support
from workers.teacher.head import HeadScores


def build_score(payload: Payload, hidden_ND: Tensor, said: HeadScores) -> Score:
    """Return the score of N tokens with these final states; a `hidden` payload carries the states themselves."""
    sampled_N: Float32 = said.sampled_logprobs_N.cpu().numpy()
    match payload:
        case Payload.sampled:
            return SampledScore(logprobs_N=sampled_N)
        case Payload.support:
            return pack_support(said.ids_NK.cpu().numpy(), said.logprobs_NK.cpu().numpy(), sampled_logprobs_N=sampled_N)
        case Payload.hidden:
            return HiddenScore(hidden_ND=to_numpy(hidden_ND), sampled_logprobs_N=sampled_N)


def to_numpy(tensor: Tensor) -> Any:
    """Return a contiguous array; bfloat16, which numpy lacks, travels as its bits in uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.float().numpy()


def num_bytes(score: Score) -> int:
    """Return the size of a score's arrays."""
    match score:
        case SampledScore():
            return score.logprobs_N.nbytes + score.valid_N.nbytes
        case SupportScore():
            ids_bytes = score.low_ids_NK.nbytes + score.page_starts_NH.nbytes
            return ids_bytes + score.logprobs_NK.nbytes + score.sampled_logprobs_N.nbytes
        case HiddenScore():
            return score.hidden_ND.nbytes + score.sampled_logprobs_N.nbytes
