"""Reads the `prompt_logprobs` of a vLLM server's answer into arrays.

The server sends one JSON object a position, `{"<id>": {"logprob": x, "rank": r, "decoded_token": s}, ...}`: the K
likeliest ids, and the position's own token where it is not among them. Position 0 has none (null).

Suffixes: N response tokens, K candidates, E columns of a padded row (K + 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from opd_ray.protocol import Float32, Int32
from workers.teacher.errors import BadScore

_NO_ID = -1
_MINUS_INFINITY = -9999.0  # how the server writes it
_MASS_TOLERANCE = 1e-3

Bool = npt.NDArray[np.bool_]


class _Candidate(msgspec.Struct, gc=False):
    logprob: float


_Position = dict[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], _Candidate] | None


class _Choice(msgspec.Struct):
    prompt_logprobs: list[_Position] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What the server says about the response tokens of one sequence, at temperature 1."""

    ids_NK: Int32  # [N,K] the likeliest, descending
    logprobs_NK: Float32  # [N,K] full vocabulary
    sampled_logprobs_N: Float32  # [N] of the tokens themselves


def read(answer: bytes, *, num_prompt_tokens: int, response_ids: Int32, top_k: int, vocab_size: int) -> TokenScores:
    """Return the scores of the last `len(response_ids)` positions.

    Raises BadScore when the answer does not speak of every token of the sequence, has not exactly `top_k` candidates
    and the token itself at every response position, or holds ids outside 0..vocab_size - 1 or values that are no
    log-probs.
    """
    rows = _response_rows(answer, num_prompt_tokens=num_prompt_tokens, num_response_tokens=len(response_ids))
    lengths_N = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    _check_each(
        (lengths_N == top_k) | (lengths_N == top_k + 1),
        lambda n: f"{lengths_N[n]} candidates, expected {top_k}, or {top_k + 1} with the token itself",
    )
    filled_NE = np.arange(top_k + 1) < lengths_N[:, None]
    ids_NE = np.full(filled_NE.shape, _NO_ID, dtype=np.int32)
    logprobs_NE = np.full(filled_NE.shape, -np.inf, dtype=np.float32)
    total = int(lengths_N.sum())
    ids_NE[filled_NE] = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=total)
    candidates = chain.from_iterable(row.values() for row in rows)
    logprobs_NE[filled_NE] = np.fromiter((c.logprob for c in candidates), dtype=np.float32, count=total)
    _check_values(ids_NE, logprobs_NE, filled_NE=filled_NE, vocab_size=vocab_size)

    is_sampled_NE = ids_NE == response_ids[:, None]
    _check_each(is_sampled_NE.any(1), lambda n: f"the token itself, id {response_ids[n]}, is missing")
    sampled_N = logprobs_NE[is_sampled_NE]
    is_extra_NE = is_sampled_NE & (lengths_N == top_k + 1)[:, None]
    top_NE = filled_NE & ~is_extra_NE
    ids_NK = ids_NE[top_NE].reshape(len(rows), top_k)
    logprobs_NK = logprobs_NE[top_NE].reshape(len(rows), top_k)
    _check_each(
        ~is_extra_NE.any(1) | (sampled_N <= logprobs_NK.min(axis=1, initial=np.inf)),
        lambda _: f"{top_k + 1} candidates, of which the token itself is not the least likely",
    )
    _check_mass(logprobs_NK if top_k else sampled_N[:, None])
    order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")
    return TokenScores(
        ids_NK=np.take_along_axis(ids_NK, order_NK, axis=1),
        logprobs_NK=np.take_along_axis(logprobs_NK, order_NK, axis=1),
        sampled_logprobs_N=sampled_N,
    )


def _response_rows(
    answer: bytes, *, num_prompt_tokens: int, num_response_tokens: int
) -> Sequence[dict[int, _Candidate]]:
    try:
        choices = _DECODER.decode(answer).choices
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadScore(f"the answer cannot be read: {error}") from None
    if len(choices) != 1 or choices[0].prompt_logprobs is None:
        raise BadScore(f"{len(choices)} choices, expected 1 with prompt_logprobs")
    positions = choices[0].prompt_logprobs
    expected = num_prompt_tokens + num_response_tokens
    if len(positions) != expected:
        raise BadScore(f"prompt_logprobs of {len(positions)} positions, expected {expected}")
    rows = [row for row in positions[num_prompt_tokens:] if row is not None]
    if len(rows) != num_response_tokens:
        raise BadScore(f"{num_response_tokens - len(rows)} response positions without candidates")
    return rows


def _check_values(ids_NE: Int32, logprobs_NE: Float32, *, filled_NE: Bool, vocab_size: int) -> None:
    in_range_NE = (ids_NE >= 0) & (ids_NE < vocab_size)
    _check_each(
        np.logical_and.reduce(in_range_NE | ~filled_NE, axis=1),
        lambda n: f"id {ids_NE[n].max()}, expected 0 to {vocab_size - 1}, the ids that student and teacher share",
    )
    finite_NE = np.isfinite(logprobs_NE) & (logprobs_NE > _MINUS_INFINITY)
    _check_each(
        np.logical_and.reduce(finite_NE | ~filled_NE, axis=1),
        lambda n: f"a log-prob that is not finite: {logprobs_NE[n].tolist()}",
    )


def _check_mass(logprobs_NK: Float32) -> None:
    mass_N = np.exp(logprobs_NK).sum(axis=1, dtype=np.float64)
    _check_each(
        mass_N <= 1 + _MASS_TOLERANCE,
        lambda n: f"values that are no log-probs, of mass {mass_N[n]:.4g}; has the server another --logprobs-mode?",
    )


def _check_each(holds_N: Bool, describe: Callable[[int], str]) -> None:
    """Raise BadScore that describes the first response token for which something does not hold."""
    if not holds_N.all():
        n = int(np.argmin(holds_N))
        raise BadScore(f"response token {n}: {describe(n)}")
