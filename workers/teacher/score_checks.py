"""What a score must be to be learned from, whichever teacher gave it.

Suffixes: N response tokens, K ids of a support, D hidden size.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.protocol import (
    Float32,
    HiddenScore,
    Int32,
    Payload,
    SampledScore,
    Score,
    ScoreRequest,
    SupportScore,
    TrajectoryGroup,
)
from workers.support_codec import support_ids
from workers.teacher.errors import BadScore

_NO_ID = -1
_BFLOAT16_EXPONENT = np.uint16(0x7F80)  # all ones: NaN or infinite


def check_score(score: Score, group: TrajectoryGroup, request: ScoreRequest, *, vocab_size: int | None = None) -> None:
    """Raise BadScore for a payload that was not asked for, a wrong number of tokens, a value that is not finite, or an
    id that is neither -1 nor below vocab_size.

    -inf in a support stands where there is no id. A sampled token may not have it, its log-ratio would be infinite.
    """
    num_tokens = len(group.response_ids)
    match score:
        case SampledScore() if request.payload is Payload.sampled:
            _check_length("log-probs", score.logprobs_N, num_tokens)
            _check_length("valid marks", score.valid_N, num_tokens if len(score.valid_N) else 0)
            _check_sampled(score.logprobs_N)
        case SupportScore() if request.payload is Payload.support:
            ids_NK = support_ids(score)
            _check_length("rows of ids", ids_NK, num_tokens)
            _check_length("sampled log-probs", score.sampled_logprobs_N, num_tokens if request.sampled_logprobs else 0)
            _check_ids(ids_NK, vocab_size=vocab_size)
            _check_rows("log-prob", score.logprobs_NK, score.logprobs_NK < np.inf)  # false for NaN
            _check_sampled(score.sampled_logprobs_N)
        case HiddenScore() if request.payload is Payload.hidden:
            _check_length("hidden states", score.hidden_ND, num_tokens)
            _check_length("sampled log-probs", score.sampled_logprobs_N, num_tokens if request.sampled_logprobs else 0)
            _check_rows("hidden state", score.hidden_ND, _is_finite(score.hidden_ND))
            _check_sampled(score.sampled_logprobs_N)
        case _:
            raise BadScore(f"the teacher gave a {type(score).__name__}, expected the payload {request.payload.value}")


def _check_length(name: str, values: npt.NDArray[Any], expected: int) -> None:
    if len(values) != expected:
        raise BadScore(f"the teacher gave {len(values)} {name}, expected {expected}")


def _check_sampled(logprobs_N: Float32) -> None:
    _check_rows("log-prob of the sampled token", logprobs_N, np.isfinite(logprobs_N))


def _check_ids(ids_NK: Int32, *, vocab_size: int | None) -> None:
    limit = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    good_NK = (ids_NK >= _NO_ID) & (ids_NK < limit)
    if not good_NK.all():
        n, k = np.argwhere(~good_NK)[0]
        raise BadScore(f"response token {n}: the teacher gave the id {ids_NK[n, k]}, expected -1 to {limit - 1}")


def _is_finite(hidden_ND: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return where states are finite, be they floats or the bits of bfloat16."""
    if hidden_ND.dtype == np.uint16:
        return (hidden_ND & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT
    return np.isfinite(hidden_ND)


def _check_rows(name: str, values: npt.NDArray[Any], good: npt.NDArray[np.bool_]) -> None:
    """Raise BadScore that names the first token with a value that is not good."""
    if not good.all():
        place = tuple(np.argwhere(~good)[0])
        given = "not finite" if values.dtype == np.uint16 else str(values[place])
        raise BadScore(f"response token {place[0]}: the teacher gave a {name} that is {given}")
