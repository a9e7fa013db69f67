import numpy as np
import pytest
import torch
from groups import make_group

from opd_ray.objectives import HiddenSignal, SampledSignal, SupportSignal
from opd_ray.protocol import HiddenScore, SampledScore, SupportScore
from workers.learner.inputs import InputBuilder, split_groups
from workers.learner.objective import TokenPlan, sampled_tokens
from workers.support_codec import pack_support

FIRST = make_group([1, 2], [11, 12, 13], [21], masked=(1,))
SECOND = make_group([3], [31, 32])
HEADS = {"narrow": torch.randn(9, 3), "wide": torch.randn(9, 4)}
NO_LOGPROBS = np.empty(0, dtype=np.float32)
# Token 1 was not chosen by the policy, token 5 is masked by the objective.
PLAN = TokenPlan(
    kept_N=torch.tensor([True, False, True, True, True, False]),
    weights_N=torch.arange(6) / 8,
    advantages_N=-torch.arange(6) / 4,
    denominator=4.0,
)


def sampled(num_tokens: int, start: float) -> SampledScore:
    return SampledScore(logprobs_N=np.arange(start, start + num_tokens, dtype=np.float32))


SAMPLED = [sampled(4, -40), sampled(2, -80)]


def support_scores(sampled_logprobs_N: np.ndarray = NO_LOGPROBS) -> list[SupportScore]:
    """Return scores whose row n over both groups has the ids 2n and 2n + 1, with minus the id as log-prob."""
    ids_NK = np.arange(12, dtype=np.int32).reshape(6, 2)
    return [
        pack_support(ids_NK[rows], -ids_NK[rows].astype(np.float32), sampled_logprobs_N=sampled_logprobs_N[rows])
        for rows in (slice(4), slice(4, 6))
    ]


def hidden_scores(hidden_ND: np.ndarray) -> list[HiddenScore]:
    return [HiddenScore(hidden_ND=hidden_ND[rows], sampled_logprobs_N=NO_LOGPROBS) for rows in (slice(4), slice(4, 6))]


def inputs_of(scores: list, order: list[int], *, removed_ids: tuple[int, ...] = (), packing: bool = True) -> dict:
    sequences = split_groups([FIRST, SECOND], scores, PLAN, teachers=["wide", "wide"])
    builder = InputBuilder(device=torch.device("cpu"), teacher_heads=HEADS, removed_ids=removed_ids, packing=packing)
    return builder.build([sequences[i] for i in order])


def test_groups_are_split_into_their_trajectories_in_order_with_their_own_rows():
    sequences = split_groups([FIRST, SECOND], SAMPLED, PLAN, teachers=["wide", "narrow"])
    assert [s.prompt_ids.tolist() for s in sequences] == [[1, 2], [1, 2], [3]]
    assert [s.response_ids.tolist() for s in sequences] == [[11, 12, 13], [21], [31, 32]]
    assert [s.token_versions.tolist() for s in sequences] == [[0, 1, 2], [3], [0, 1]]
    assert [s.kept.tolist() for s in sequences] == [[True, False, True], [True], [True, False]]
    assert [s.weights.tolist() for s in sequences] == [[0, 0.125, 0.25], [0.375], [0.5, 0.625]]
    assert [s.advantages.tolist() for s in sequences] == [[0, -0.25, -0.5], [-0.75], [-1.0, -1.25]]
    assert [s.teacher for s in sequences] == ["wide", "wide", "narrow"]
    assert [s.score.logprobs_N.tolist() for s in sequences] == [[-40, -39, -38], [-37], [-80, -79]]
    np.testing.assert_allclose(sequences[1].sampled_logprobs, [-0.3])


def test_splitting_copies_nothing():
    sequences = split_groups([FIRST], SAMPLED[:1], PLAN, teachers=["wide"])
    assert all(np.shares_memory(s.response_ids, FIRST.response_ids) for s in sequences)
    assert all(np.shares_memory(s.weights, PLAN.weights_N.numpy()) for s in sequences)
    assert np.shares_memory(sequences[0].score.logprobs_N, SAMPLED[0].logprobs_N)


def test_as_many_scores_as_groups_are_expected():
    with pytest.raises(ValueError, match="zip"):
        split_groups([FIRST, SECOND], SAMPLED[:1], PLAN, teachers=["wide", "wide"])
    with pytest.raises(ValueError, match="zip"):
        split_groups([FIRST, SECOND], SAMPLED, PLAN, teachers=["wide"])


def test_a_sequence_without_loss_is_masked_whole_and_otherwise_the_same():
    (sequence, *_) = split_groups([FIRST], SAMPLED[:1], PLAN, teachers=["wide"])
    silent = sequence.without_loss()
    assert not silent.kept.any()
    assert silent.response_ids is sequence.response_ids
    assert sequence.kept.any()
    assert PLAN.kept_N.any()


def test_without_an_objective_every_token_that_the_policy_chose_counts_alike():
    plan = sampled_tokens([FIRST, SECOND], SAMPLED)
    assert plan.kept_N.tolist() == [True, False, True, True, True, True]
    assert plan.weights_N.tolist() == [1, 0, 1, 1, 1, 1]
    assert plan.advantages_N.tolist() == [0] * 6
    assert plan.denominator == 5.0


def test_without_packing_the_sequences_are_padded():
    inputs = inputs_of(SAMPLED, [2, 0], packing=False)
    sequences = inputs["sequences"]
    assert sequences["input_ids"].tolist() == [[3, 31, 32, 0, 0], [1, 2, 11, 12, 13]]
    assert sequences["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert inputs["state_rows_N"].tolist() == [0, 1, 6, 7, 8]


def test_the_inputs_of_a_micro_batch_follow_the_order_of_its_sequences():
    inputs = inputs_of(SAMPLED, [2, 0])
    sequences = inputs["sequences"]
    assert sequences["input_ids"].tolist() == [[3, 31, 32, 1, 2, 11, 12, 13]]
    assert sequences["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert sequences["packing"].bounds_B1.tolist() == [0, 3, 8]
    assert inputs["state_rows_N"].tolist() == [0, 1, 4, 5, 6]
    tokens = inputs["tokens"]
    assert tokens.ids_N.tolist() == [31, 32, 11, 12, 13]
    assert tokens.offsets.tolist() == [0, 2, 5]
    assert tokens.mask_N.tolist() == [True, False, True, False, True]
    assert tokens.weights_N.tolist() == [0.5, 0.625, 0, 0.125, 0.25]
    assert tokens.advantages_N.tolist() == [-1.0, -1.25, 0, -0.25, -0.5]
    np.testing.assert_allclose(tokens.sampler_logprobs_N, [0, -0.1, 0, -0.1, -0.2])


def test_sampled_scores_are_joined_in_the_order_of_the_sequences():
    signal = inputs_of(SAMPLED, [2, 1])["signal"]
    assert isinstance(signal, SampledSignal)
    assert signal.logprobs_N.tolist() == [-80, -79, -37]


def test_support_scores_are_joined_and_their_ids_are_those_that_torch_gathers_by():
    signal = inputs_of(support_scores(), [2, 1])["signal"]
    assert isinstance(signal, SupportSignal)
    assert signal.ids_NK.dtype is torch.int64
    assert signal.ids_NK.tolist() == [[8, 9], [10, 11], [6, 7]]
    assert signal.logprobs_NK.tolist() == [[-8, -9], [-10, -11], [-6, -7]]
    assert signal.sampled_logprobs_N.tolist() == []


def test_a_support_of_small_ids_and_one_of_large_ids_are_joined():
    logprobs_NK = -np.arange(8, dtype=np.float32).reshape(4, 2)
    large = pack_support(np.array([[99_999, 7]] * 4, np.int32), logprobs_NK, sampled_logprobs_N=NO_LOGPROBS)
    signal = inputs_of([large, support_scores()[1]], [2, 1])["signal"]
    assert signal.ids_NK.tolist() == [[8, 9], [10, 11], [7, 99_999]]
    assert signal.logprobs_NK.tolist() == [[-8, -9], [-10, -11], [-7, -6]]


def test_the_sampled_logprobs_of_a_support_go_with_their_sequences():
    signal = inputs_of(support_scores(sampled_logprobs_N=-np.arange(6, dtype=np.float32)), [2, 0])["signal"]
    assert signal.sampled_logprobs_N.tolist() == [-4, -5, 0, -1, -2]


def test_removed_ids_leave_every_support_and_the_scores_stay_as_they_came():
    scores = support_scores()
    signal = inputs_of(scores, [2, 1], removed_ids=(9, 6, 77))["signal"]
    assert signal.ids_NK.tolist() == [[8, -1], [10, 11], [-1, 7]]
    assert signal.logprobs_NK.tolist() == [[-8, -9], [-10, -11], [-6, -7]]
    assert scores[1].low_ids_NK.tolist() == [[8, 9], [10, 11]]


def test_hidden_scores_in_float32_are_joined_and_come_with_the_teachers_head():
    hidden_ND = torch.randn(6, 4)
    signal = inputs_of(hidden_scores(hidden_ND.numpy()), [2, 0])["signal"]
    assert isinstance(signal, HiddenSignal)
    assert torch.equal(signal.hidden_ND, hidden_ND[[4, 5, 0, 1, 2]])
    assert signal.head_VD is HEADS["wide"]


def test_every_micro_batch_is_given_the_head_of_its_own_teacher():
    scores = [
        HiddenScore(hidden_ND=np.zeros((num_tokens, width), dtype=np.float32), sampled_logprobs_N=NO_LOGPROBS)
        for num_tokens, width in ((4, 4), (2, 3))
    ]
    first, _, second = split_groups([FIRST, SECOND], scores, PLAN, teachers=["wide", "narrow"])
    builder = InputBuilder(device=torch.device("cpu"), teacher_heads=HEADS, removed_ids=(), packing=True)
    for sequence, teacher in ((first, "wide"), (second, "narrow"), (second.without_loss(), "narrow")):
        signal = builder.build([sequence])["signal"]
        assert signal.head_VD is HEADS[teacher]
        assert signal.head_VD.shape[1] == signal.hidden_ND.shape[1]


def test_hidden_scores_that_hold_the_bits_of_bfloat16_become_bfloat16_again():
    hidden_ND = torch.randn(6, 4).to(torch.bfloat16)
    signal = inputs_of(hidden_scores(hidden_ND.view(torch.uint16).numpy()), [2, 0])["signal"]
    assert signal.hidden_ND.dtype is torch.bfloat16
    assert torch.equal(signal.hidden_ND, hidden_ND[[4, 5, 0, 1, 2]])


def test_tokens_of_which_the_teacher_says_nothing_count_nowhere():
    valid_N = np.array([True, True, True, False])
    scores = [SampledScore(logprobs_N=SAMPLED[0].logprobs_N, valid_N=valid_N), SAMPLED[1]]
    assert sampled_tokens([FIRST, SECOND], scores).kept_N.tolist() == [True, False, True, False, True, True]
