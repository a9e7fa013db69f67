"""Each defect of a score is found and named, in whatever payload; what is no defect passes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from groups import make_group

from opd_ray.protocol import HiddenScore, Payload, SampledScore, Score, ScoreRequest
from workers.support_codec import pack_support
from workers.teacher.errors import BadScore
from workers.teacher.score_checks import check_score

GROUP = make_group([1, 2, 3], [4, 5], [6, 7, 8])
VOCAB_SIZE = 30
REQUESTS = {payload: ScoreRequest(payload=payload, top_k=3, sampled_logprobs=True) for payload in Payload}
NONE = np.empty(0, dtype=np.float32)


def logprobs(*shape: int) -> Any:
    return -np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def score(payload: Payload, *, num_tokens: int = 5, bits: bool = False) -> Score:
    """Return a score without a defect."""
    match payload:
        case Payload.sampled:
            return SampledScore(logprobs_N=logprobs(num_tokens))
        case Payload.support:
            ids = np.tile(np.array([0, VOCAB_SIZE - 1, -1], dtype=np.int32), (num_tokens, 1))
            return pack_support(ids, logprobs(num_tokens, 3), sampled_logprobs_N=logprobs(num_tokens))
        case Payload.hidden:
            hidden = logprobs(num_tokens, 4)
            if bits:
                hidden = (hidden.view(np.uint32) >> 16).astype(np.uint16)
            return HiddenScore(hidden_ND=hidden, sampled_logprobs_N=logprobs(num_tokens))


def check(given: Score, payload: Payload, **more: Any) -> None:
    check_score(given, GROUP, replace(REQUESTS[payload], **more), vocab_size=VOCAB_SIZE)


def put(values: Any, place: tuple[int, ...], value: float) -> Any:
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize("payload", list(Payload))
def test_a_sound_score_passes(payload: Payload):
    check(score(payload), payload)


def test_hidden_states_as_the_bits_of_bfloat16_pass():
    check(score(Payload.hidden, bits=True), Payload.hidden)


@pytest.mark.parametrize("payload", [Payload.support, Payload.hidden])
def test_log_probs_of_sampled_tokens_are_there_exactly_when_asked_for(payload: Payload):
    check(replace(score(payload), sampled_logprobs_N=NONE), payload, sampled_logprobs=False)
    with pytest.raises(BadScore, match="0 sampled log-probs, expected 5"):
        check(replace(score(payload), sampled_logprobs_N=NONE), payload)
    with pytest.raises(BadScore, match="5 sampled log-probs, expected 0"):
        check(score(payload), payload, sampled_logprobs=False)


@pytest.mark.parametrize("payload", list(Payload))
@pytest.mark.parametrize("num_tokens", [4, 6])
def test_a_wrong_number_of_tokens_is_refused(payload: Payload, num_tokens: int):
    with pytest.raises(BadScore, match=rf"the teacher gave {num_tokens} .*, expected 5"):
        check(score(payload, num_tokens=num_tokens), payload)


def test_marks_of_validity_are_of_all_tokens_or_of_none():
    given = SampledScore(logprobs_N=logprobs(5), valid_N=np.ones(5, dtype=np.bool_))
    check(given, Payload.sampled)
    with pytest.raises(BadScore, match="4 valid marks, expected 5"):
        check(replace(given, valid_N=np.ones(4, dtype=np.bool_)), Payload.sampled)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_prob_of_a_sampled_token_must_be_finite(value: float):
    words = rf"response token 3: the teacher gave a log-prob of the sampled token that is {value}"
    with pytest.raises(BadScore, match=words):
        check(SampledScore(logprobs_N=put(logprobs(5), (3,), value)), Payload.sampled)
    for payload in (Payload.support, Payload.hidden):
        with pytest.raises(BadScore, match=words):
            check(replace(score(payload), sampled_logprobs_N=put(logprobs(5), (3,), value)), payload)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_log_probs_of_a_support_must_be_below_infinity(value: float):
    given = score(Payload.support)
    with pytest.raises(BadScore, match=f"response token 2: the teacher gave a log-prob that is {value}"):
        check(replace(given, logprobs_NK=put(given.logprobs_NK, (2, 1), value)), Payload.support)


@pytest.mark.parametrize("id_", [VOCAB_SIZE, 70_000])
def test_an_id_out_of_range_is_refused(id_: int):
    ids = np.tile(np.array([0, 1, 2], dtype=np.int32), (5, 1))
    ids[4, 1] = id_
    given = pack_support(ids, logprobs(5, 3), sampled_logprobs_N=logprobs(5))
    with pytest.raises(BadScore, match=rf"response token 4: the teacher gave the id {id_}, expected -1 to 29"):
        check(given, Payload.support)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_hidden_state_must_be_finite(value: float):
    given = score(Payload.hidden)
    with pytest.raises(BadScore, match=rf"response token 1: the teacher gave a hidden state that is {value}"):
        check(replace(given, hidden_ND=put(given.hidden_ND, (1, 3), value)), Payload.hidden)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_bits_of_a_hidden_state_must_be_those_of_a_finite_one(value: float):
    given = score(Payload.hidden, bits=True)
    bits = np.float32(value).view(np.uint32) >> 16
    with pytest.raises(BadScore, match="response token 1: the teacher gave a hidden state that is not finite"):
        check(replace(given, hidden_ND=put(given.hidden_ND, (1, 3), bits)), Payload.hidden)


@pytest.mark.parametrize("payload", list(Payload))
def test_another_payload_than_asked_for_is_refused(payload: Payload):
    for other in set(Payload) - {payload}:
        with pytest.raises(BadScore, match=rf"expected the payload {payload.value}"):
            check(score(other), payload)
