"""How far our payloads are from vLLM's prompt log-probs, in nats.

Suffixes: N response tokens, K likeliest ids, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opd_ray.protocol import Float32, HiddenScore, Int32, SampledScore, Score, SupportScore, TrajectoryGroup
from workers.support_codec import support_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What vLLM says of a group's response tokens."""

    ids_NK: Int32  # descending by log-prob
    logprobs_NK: Float32
    sampled_logprobs_N: Float32


def read_reference(prompt_logprobs: Sequence[Any], group: TrajectoryGroup, *, top_k: int) -> Reference:
    """Return vLLM's default form as arrays: at each place a mapping from id to an object that has its `logprob`."""
    first = len(group.prompt_ids)  # the place of a sequence's first response token
    places = [place for sequence in prompt_logprobs for place in sequence[first:]]
    rows = [sorted(((-entry.logprob, id_) for id_, entry in place.items()))[:top_k] for place in places]
    table = np.array(rows)
    sampled = [place[id_].logprob for place, id_ in zip(places, group.response_ids.tolist(), strict=True)]
    return Reference(
        ids_NK=table[:, :, 1].astype(np.int32),
        logprobs_NK=-table[:, :, 0].astype(np.float32),
        sampled_logprobs_N=np.array(sampled, dtype=np.float32),
    )


def largest_difference(score: Score, reference: Reference, *, head_VD: torch.Tensor, normalised: bool) -> float:
    """Return the largest difference; that of a support which is not normalised once both sides are, in the support."""
    match score:
        case SampledScore():
            difference = score.logprobs_N - reference.sampled_logprobs_N
        case HiddenScore():
            logprobs_NV = (torch.from_numpy(score.hidden_ND) @ head_VD.T).log_softmax(-1)
            given_NK = logprobs_NV.gather(1, torch.from_numpy(reference.ids_NK).long())
            difference = given_NK.numpy() - reference.logprobs_NK
        case SupportScore():
            expected_NK = _looked_up(support_ids(score), reference)
            difference = score.logprobs_NK - expected_NK
            if not normalised:
                difference = _normalised(score.logprobs_NK) - _normalised(expected_NK)
    return float(np.abs(difference).max())


def _looked_up(ids_NK: Int32, reference: Reference) -> Float32:
    """Return the reference's log-probs at ids; at one that it lacks that of its last: a tie may go either way."""
    same_NKK = ids_NK[:, :, None] == reference.ids_NK[:, None, :]
    places_NK = np.where(same_NKK.any(-1), same_NKK.argmax(-1), -1)
    return np.take_along_axis(reference.logprobs_NK, places_NK, axis=1)


def _normalised(logprobs_NK: Float32) -> Float32:
    return logprobs_NK - np.logaddexp.reduce(logprobs_NK, axis=1, keepdims=True)
