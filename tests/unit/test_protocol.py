import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import numpy as np
import pytest
from fakes import make_prompt, make_request, make_summary

import opd_ray.protocol as protocol
from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions
from opd_ray.protocol import (
    Batch,
    Finish,
    GenerateRequest,
    GroupHandle,
    HiddenScore,
    Payload,
    SampledScore,
    SamplingOptions,
    ScoreHandle,
    ScoreRequest,
    ScoreSummary,
    SupportScore,
    TrajectoryGroup,
    WeightBundle,
)

SAMPLING = SamplingOptions(
    num_samples=2, max_response_tokens=8, temperature=0.7, top_p=1.0, support_size=2, support_top_p=0.9
)
GROUP = TrajectoryGroup(
    prompt_ids=np.array([3, 1], dtype=np.int32),
    response_ids=np.array([4, 5, 6, 7, 8], dtype=np.int32),
    offsets=np.array([0, 2, 5], dtype=np.int32),
    sampled_logprobs=np.linspace(-2, 0, 5, dtype=np.float32),
    token_versions=np.array([0, 0, 1, 1, 2], dtype=np.int32),
    loss_mask=np.array([True, True, False, True, True]),
    support_ids=np.arange(10, dtype=np.int32).reshape(5, 2),
    rewards=np.array([1.0, 0.0], dtype=np.float32),
    finish=np.array([Finish.stop, Finish.length], dtype=np.int8),
    prompt_index=7,
    task="sort",
    seed=11,
)
SUPPORT = SupportScore(
    low_ids_NK=np.arange(6, dtype=np.uint16).reshape(3, 2),
    page_starts_NH=np.array([[1, 2], [0, 1], [2, 2]], dtype=np.uint16),
    logprobs_NK=np.zeros((3, 2), np.float32),
    sampled_logprobs_N=np.linspace(-2, 0, 3, dtype=np.float32),
)
HANDLES = {
    "groups": [GroupHandle(request=make_request(), summary="summary", group="group")],
    "scores": [ScoreHandle(teacher="teacher", summary="summary", score="score")],
}
MESSAGES = [
    SAMPLING,
    make_prompt(4, answer="12"),
    GenerateRequest(prompt=make_prompt(), sampling=SAMPLING, version=3, seed=9, step=0, position=0),
    GROUP,
    make_summary(2, 3, rewards=[1.0, 0.0]),
    ScoreRequest(payload=Payload.support, support="union", top_k=4, top_p=0.9, include_sampled=True, normalised=False),
    SampledScore(logprobs_N=np.linspace(-3, 0, 4, dtype=np.float32)),
    SUPPORT,
    HiddenScore(
        hidden_ND=np.arange(8, dtype=np.uint16).reshape(2, 4), sampled_logprobs_N=np.zeros(0, dtype=np.float32)
    ),
    ScoreSummary(num_tokens=5, num_bytes=20, dropped_mass_sum=0.01, score_s=0.1, fault="NaN"),
    *HANDLES["groups"],
    *HANDLES["scores"],
    Batch(step=2, groups=HANDLES["groups"], scores=HANDLES["scores"]),
    WeightBundle(version=4, manifest="manifest", buffer="buffer"),
]
BY_NAME = {type(message).__name__: message for message in MESSAGES}


def assert_same(given: object, expected: object) -> None:
    assert type(given) is type(expected)
    if isinstance(expected, np.ndarray):
        assert given.dtype == expected.dtype
        np.testing.assert_array_equal(given, expected)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(given, field.name), getattr(expected, field.name))
    elif isinstance(expected, list):
        assert len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            assert_same(one, other)
    else:
        assert given == expected


def test_every_message_of_the_protocol_is_tried_here():
    made_here = {
        name: value for name, value in vars(protocol).items() if getattr(value, "__module__", None) == protocol.__name__
    }
    messages = {name for name, value in made_here.items() if is_dataclass(value)}
    assert messages == BY_NAME.keys()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("version", [4, 5])
def test_a_message_survives_pickle_with_equal_arrays(name: str, version: int):
    message = BY_NAME[name]
    assert_same(pickle.loads(pickle.dumps(message, protocol=version)), message)  # noqa: S301 - our own bytes


@pytest.mark.parametrize("name", BY_NAME)
def test_a_message_is_frozen_and_takes_no_new_fields(name: str):
    message = BY_NAME[name]
    first = fields(message)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(message, first, getattr(message, first))
    assert not hasattr(message, "__dict__")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_message_is_built_with_keywords_only(name: str):
    message = BY_NAME[name]
    with pytest.raises(TypeError):
        type(message)(*(getattr(message, field.name) for field in fields(message)))


@pytest.mark.parametrize("name", ["sampled_logprobs", "token_versions", "loss_mask", "support_ids"])
def test_a_per_token_array_of_another_length_than_the_responses_is_refused(name: str):
    with pytest.raises(ValueError, match=rf"TrajectoryGroup\.{name} has 4 entries, expected 5"):
        replace(GROUP, **{name: getattr(GROUP, name)[:4]})


def test_a_group_with_another_number_of_finishes_than_of_samples_is_refused():
    with pytest.raises(ValueError, match=r"TrajectoryGroup\.finish has 1 entries, expected 2"):
        replace(GROUP, finish=GROUP.finish[:1])


def test_a_group_has_a_reward_for_each_sample_or_none_at_all():
    with pytest.raises(ValueError, match=r"TrajectoryGroup\.rewards has 1 entries, expected 2"):
        replace(GROUP, rewards=GROUP.rewards[:1])
    with pytest.raises(ValueError, match=r"TrajectoryGroup\.rewards has 3 entries, expected 2"):
        replace(GROUP, rewards=np.zeros(3, dtype=np.float32))
    assert len(replace(GROUP, rewards=GROUP.rewards[:0]).rewards) == 0


@pytest.mark.parametrize("payload", Payload)
def test_a_request_asks_for_nothing_more_than_its_payload_unless_told(payload: Payload):
    request = ScoreRequest(payload=payload)
    assert (request.sampled_logprobs, request.include_sampled, request.normalised) == (False, False, True)
    assert (request.support, request.top_k, request.top_p) == ("teacher", 0, 1.0)


@pytest.mark.parametrize("offsets", [[0, 2, 4], [1, 2, 5]])
def test_offsets_that_do_not_span_all_tokens_are_refused(offsets: list[int]):
    with pytest.raises(ValueError, match=rf"offsets span {offsets[0]}\.\.{offsets[-1]}, not 0\.\.5"):
        replace(GROUP, offsets=np.array(offsets, dtype=np.int32))


def test_a_support_whose_ids_and_logprobs_differ_in_shape_is_refused():
    with pytest.raises(ValueError, match=r"SupportScore: ids \(3, 2\) and logprobs \(3, 1\) differ"):
        replace(SUPPORT, logprobs_NK=SUPPORT.logprobs_NK[:, :1])
    with pytest.raises(ValueError, match=r"SupportScore\.page_starts_NH has 2 entries, expected 3"):
        replace(SUPPORT, page_starts_NH=SUPPORT.page_starts_NH[:2])


def test_every_objective_asks_for_a_payload_of_the_protocol():
    options = [ObjectiveOptions(policy=PolicyOptions(kl_baseline=given)) for given in (False, True)]
    asked = {name: [Payload(objective.payload(o)) for o in options] for name, objective in OBJECTIVES.items()}
    assert asked == {
        "sampled": [Payload.sampled, Payload.hidden],
        "support": [Payload.support] * 2,
        "full": [Payload.hidden] * 2,
    }
