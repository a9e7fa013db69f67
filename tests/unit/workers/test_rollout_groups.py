from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import make_prompt

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import RolloutConfig
from opd_ray.protocol import Finish, GenerateRequest, SamplingOptions, TrajectoryGroup
from workers.rollout.worker import _rewards, build_group, logprob_args, repetition, within_mass

SAMPLING = SamplingOptions(
    num_samples=2, max_response_tokens=3, temperature=1.0, top_p=1.0, support_size=0, support_top_p=1.0
)
REQUEST = GenerateRequest(prompt=make_prompt(7, task="sort"), sampling=SAMPLING, version=4, seed=11, step=0, position=0)
NO_REWARDS = np.empty(0, dtype=np.float32)

Candidates = list[tuple[int, float]]  # id and log-prob: the sampled token, then the likeliest in order


def completion(positions: list[Candidates], spans: list[tuple[int, int, str]], reason: str) -> SimpleNamespace:
    """Return what vLLM gives: the candidates of all positions laid end to end, and where each position starts."""
    sizes = [len(candidates) for candidates in positions]
    return SimpleNamespace(
        token_ids=[candidates[0][0] for candidates in positions],
        logprobs=SimpleNamespace(
            token_ids=[id_ for candidates in positions for id_, _ in candidates],
            logprobs=[logprob for candidates in positions for _, logprob in candidates],
            start_indices=np.cumsum([0, *sizes])[:-1].tolist(),
        ),
        weight_versions=[SimpleNamespace(start=a, end=b, version=version) for a, b, version in spans],
        finish_reason=reason,
    )


GROUP = build_group(
    REQUEST,
    [
        completion(
            [[(5, -0.1), (9, -99.0)], [(6, -0.2), (9, -99.0)], [(7, -0.3), (9, -99.0)]],
            [(0, 2, "4"), (2, 3, "5")],
            "length",
        ),
        completion([[(8, -0.4), (9, -99.0)]], [(0, 1, "5")], "stop"),
    ],
    rewards=np.array([0.0, 1.0], dtype=np.float32),
)


def test_completions_are_laid_end_to_end():
    assert GROUP.response_ids.tolist() == [5, 6, 7, 8]
    assert GROUP.offsets.tolist() == [0, 3, 4]
    assert GROUP.finish.tolist() == [Finish.length, Finish.stop]
    assert GROUP.rewards.tolist() == [0.0, 1.0]
    assert GROUP.loss_mask.all()
    assert GROUP.support_ids.shape == (4, 0)


def test_the_logprobs_are_those_of_the_sampled_tokens():
    np.testing.assert_allclose(GROUP.sampled_logprobs, [-0.1, -0.2, -0.3, -0.4], rtol=1e-6)


def test_each_token_keeps_the_version_that_sampled_it():
    assert GROUP.token_versions.tolist() == [4, 4, 5, 5]


def test_the_group_knows_its_prompt():
    assert GROUP.prompt_ids is REQUEST.prompt.ids_P
    assert (GROUP.prompt_index, GROUP.task, GROUP.seed) == (7, "sort", 11)


def test_the_arrays_have_the_types_that_the_protocol_says():
    for group in (GROUP, supported_group(3), supported_group(3, top_p=0.5)):
        for name in ("prompt_ids", "response_ids", "offsets", "token_versions", "support_ids"):
            assert getattr(group, name).dtype == np.int32
        assert group.sampled_logprobs.dtype == np.float32
        assert group.finish.dtype == np.int8
        assert group.rewards.dtype == np.float32


def logs(*pairs: tuple[int, float]) -> Candidates:
    return [(id_, float(np.log(probability))) for id_, probability in pairs]


# Sampled the second, the first and one outside the likeliest three.
FIRST = completion(
    [
        logs((21, 0.25), (20, 0.5), (21, 0.25), (22, 0.125)),
        logs((30, 0.9), (30, 0.9), (31, 0.05), (32, 0.01)),
    ],
    [(0, 2, "4")],
    "length",
)
SECOND = completion([logs((49, 0.01), (40, 0.4), (41, 0.3), (42, 0.2))], [(0, 1, "4")], "stop")


def supported_group(size: int, *, top_p: float = 1.0) -> TrajectoryGroup:
    sampling = replace(SAMPLING, support_size=size, support_top_p=top_p)
    return build_group(replace(REQUEST, sampling=sampling), [FIRST, SECOND], rewards=NO_REWARDS)


def test_the_support_is_the_likeliest_tokens_in_order_whatever_was_sampled():
    group = supported_group(3)
    assert group.response_ids.tolist() == [21, 30, 49]
    assert group.support_ids.tolist() == [[20, 21, 22], [30, 31, 32], [40, 41, 42]]
    np.testing.assert_allclose(group.sampled_logprobs, np.log([0.25, 0.9, 0.01]), rtol=1e-6)
    assert group.support_ids.flags.c_contiguous


def test_of_more_candidates_than_were_asked_for_the_likeliest_are_taken():
    assert supported_group(1).support_ids.tolist() == [[20], [30], [40]]
    assert supported_group(2).support_ids.tolist() == [[20, 21], [30, 31], [40, 41]]


def test_of_the_likeliest_tokens_only_the_fewest_that_hold_the_mass_stay():
    group = supported_group(3, top_p=0.6)
    assert group.support_ids.tolist() == [[20, 21, -1], [30, -1, -1], [40, 41, -1]]
    assert group.response_ids.tolist() == [21, 30, 49]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [1, -1, -1, -1]),
        (0.5, [1, -1, -1, -1]),
        (0.51, [1, 2, -1, -1]),
        (0.75, [1, 2, -1, -1]),
        (0.76, [1, 2, 3, -1]),
        (0.95, [1, 2, 3, 4]),
        (1.0, [1, 2, 3, 4]),
    ],
)
def test_a_token_is_within_the_mass_unless_the_likelier_ones_hold_it_already(top_p: float, expected: list[int]):
    ids_NK = np.array([[1, 2, 3, 4]], dtype=np.int32)
    logprobs_NK = np.log(np.array([[0.5, 0.25, 0.125, 0.0625]], dtype=np.float32))
    assert within_mass(ids_NK, logprobs_NK, top_p).tolist() == [expected]


def test_the_whole_mass_keeps_every_token_even_where_rounding_fills_it_early():
    ids_NK = np.array([[1, 2, 3]], dtype=np.int32)
    assert within_mass(ids_NK, np.array([[0.0, -30.0, -40.0]], dtype=np.float32), 1.0).tolist() == [[1, 2, 3]]


def test_no_candidates_have_no_support_under_any_mass():
    nothing = np.empty((4, 0), dtype=np.int32)
    assert within_mass(nothing, nothing.astype(np.float32), 0.5).shape == (4, 0)


def test_every_response_gets_the_reward_of_its_prompts_verifier():
    rewards = _rewards(make_prompt(task="exact", answer="12"), ["12", "21", " 12 "])
    assert rewards.tolist() == [1.0, 0.0, 1.0]
    assert rewards.dtype == np.float32
    assert _rewards(make_prompt(task="numeric", answer="12"), ["it is 12.0"]).tolist() == [1.0]


def test_a_prompt_without_an_answer_gives_no_rewards_at_all():
    rewards = _rewards(make_prompt(task="exact", answer=None), ["12", "21"])
    assert (rewards.shape, rewards.dtype) == ((0,), np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_p", "mode"),
    [(1.0, 1.0, "raw_logprobs"), (1.0, 0.9, "raw_logprobs"), (0.7, 1.0, "processed_logprobs")],
)
def test_the_logprobs_are_over_the_whole_vocabulary_at_the_temperature(temperature: float, top_p: float, mode: str):
    given = logprob_args(
        RolloutConfig(temperature=temperature, top_p=top_p), ObjectiveConfig(kind=ObjectiveKind.support)
    )
    assert given["logprobs_mode"] == mode


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_logprobs_are_those_of_the_nucleus_where_the_objective_knows_it(temperature: float):
    objective = ObjectiveConfig(kind=ObjectiveKind.sampled, correct_top_p=True)
    assert logprob_args(RolloutConfig(temperature=temperature, top_p=0.9), objective)["logprobs_mode"] == (
        "processed_logprobs"
    )


@pytest.mark.parametrize(("top_k", "expected"), [(2, 20), (20, 20), (21, 21), (128, 128)])
def test_the_engine_may_give_as_many_logprobs_as_the_support_has_and_never_fewer_than_by_default(
    top_k: int, expected: int
):
    given = logprob_args(RolloutConfig(), ObjectiveConfig(kind=ObjectiveKind.support, top_k=top_k))
    assert given["max_logprobs"] == expected


def responses(*ids: list[int]) -> TrajectoryGroup:
    lengths = [len(of_one) for of_one in ids]
    flat = np.array([id_ for of_one in ids for id_ in of_one], dtype=np.int32)
    return replace(
        GROUP,
        response_ids=flat,
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        sampled_logprobs=np.zeros(len(flat), dtype=np.float32),
        token_versions=np.zeros(len(flat), dtype=np.int32),
        loss_mask=np.ones(len(flat), dtype=np.bool_),
        support_ids=np.empty((len(flat), 0), dtype=np.int32),
        rewards=np.empty(0, dtype=np.float32),
        finish=np.zeros(len(ids), dtype=np.int8),
    )


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # five 4-grams, of which the last is the first
        ([7, 7, 7, 7, 7, 7], 2 / 3),  # three, all the same
        ([1, 2, 3], 0.0),  # none
        ([1], 0.0),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(ids: list[int], share: float):
    assert repetition(responses(ids)) == pytest.approx(share)
    assert repetition(responses(ids, [1, 2, 3, 4])) == pytest.approx(share / 2)
