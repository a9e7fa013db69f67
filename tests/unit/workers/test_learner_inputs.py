import numpy as np
import pytest
import torch
from groups import make_group

from opd_ray.objectives import HiddenSignal, SampledSignal, SupportSignal
from opd_ray.protocol import HiddenScore, SampledScore, SupportScore
from workers.learner.inputs import build_inputs, split_groups

FIRST = make_group([1, 2], [11, 12, 13], [21], masked=(1,))
SECOND = make_group([3], [31, 32])
CPU, HEAD_VD = torch.device("cpu"), torch.randn(9, 4)


def sampled(num_tokens: int, start: float) -> SampledScore:
    return SampledScore(logprobs_N=np.arange(start, start + num_tokens, dtype=np.float32))


SAMPLED = [sampled(4, -40), sampled(2, -80)]


def inputs_of(scores: list, order: list[int]) -> dict:
    sequences = split_groups([FIRST, SECOND], scores)
    return build_inputs([sequences[i] for i in order], device=CPU, teacher_head_VD=HEAD_VD)


def test_groups_are_split_into_their_trajectories_in_order_with_their_own_rows():
    sequences = split_groups([FIRST, SECOND], SAMPLED)
    assert [s.prompt_ids.tolist() for s in sequences] == [[1, 2], [1, 2], [3]]
    assert [s.response_ids.tolist() for s in sequences] == [[11, 12, 13], [21], [31, 32]]
    assert [s.token_versions.tolist() for s in sequences] == [[0, 1, 2], [3], [0, 1]]
    assert [s.loss_mask.tolist() for s in sequences] == [[True, False, True], [True], [True, True]]
    assert [s.score.logprobs_N.tolist() for s in sequences] == [[-40, -39, -38], [-37], [-80, -79]]
    np.testing.assert_allclose(sequences[1].sampled_logprobs, [-0.3])


def test_splitting_copies_nothing():
    sequences = split_groups([FIRST], SAMPLED[:1])
    assert all(np.shares_memory(s.response_ids, FIRST.response_ids) for s in sequences)
    assert np.shares_memory(sequences[0].score.logprobs_N, SAMPLED[0].logprobs_N)


def test_as_many_scores_as_groups_are_expected():
    with pytest.raises(ValueError, match="zip"):
        split_groups([FIRST, SECOND], SAMPLED[:1])


def test_a_sequence_without_loss_is_masked_whole_and_otherwise_the_same():
    (sequence, *_) = split_groups([FIRST], SAMPLED[:1])
    silent = sequence.without_loss()
    assert not silent.loss_mask.any()
    assert silent.response_ids is sequence.response_ids
    assert sequence.loss_mask.any()


def test_the_inputs_of_a_micro_batch_follow_the_order_of_its_sequences():
    inputs = inputs_of(SAMPLED, [2, 0])
    assert inputs["input_ids_BT"].tolist() == [[3, 31, 32, 0, 0], [1, 2, 11, 12, 13]]
    assert inputs["attention_mask_BT"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert inputs["state_rows_N"].tolist() == [0, 1, 6, 7, 8]
    tokens = inputs["tokens"]
    assert tokens.ids_N.tolist() == [31, 32, 11, 12, 13]
    assert tokens.offsets.tolist() == [0, 2, 5]
    assert tokens.mask_N.tolist() == [True, True, True, False, True]


def test_sampled_scores_are_joined_in_the_order_of_the_sequences():
    signal = inputs_of(SAMPLED, [2, 1])["signal"]
    assert isinstance(signal, SampledSignal)
    assert signal.logprobs_N.tolist() == [-80, -79, -37]


def test_support_scores_are_joined_and_their_ids_are_those_that_torch_gathers_by():
    ids_NK = np.arange(12, dtype=np.int32).reshape(6, 2)
    scores = [
        SupportScore(ids_NK=ids_NK[rows], logprobs_NK=-ids_NK[rows].astype(np.float32))
        for rows in (slice(4), slice(4, 6))
    ]
    signal = inputs_of(scores, [2, 1])["signal"]
    assert isinstance(signal, SupportSignal)
    assert signal.ids_NK.dtype is torch.int64
    assert signal.ids_NK.tolist() == [[8, 9], [10, 11], [6, 7]]
    assert signal.logprobs_NK.tolist() == [[-8, -9], [-10, -11], [-6, -7]]


def test_hidden_scores_in_float32_are_joined_and_come_with_the_teachers_head():
    hidden_ND = torch.randn(6, 4)
    scores = [HiddenScore(hidden_ND=hidden_ND[:4].numpy()), HiddenScore(hidden_ND=hidden_ND[4:].numpy())]
    signal = inputs_of(scores, [2, 0])["signal"]
    assert isinstance(signal, HiddenSignal)
    assert torch.equal(signal.hidden_ND, hidden_ND[[4, 5, 0, 1, 2]])
    assert signal.head_VD is HEAD_VD


def test_hidden_scores_that_hold_the_bits_of_bfloat16_become_bfloat16_again():
    hidden_ND = torch.randn(6, 4).to(torch.bfloat16)
    bits = hidden_ND.view(torch.uint16).numpy()
    signal = inputs_of([HiddenScore(hidden_ND=bits[:4]), HiddenScore(hidden_ND=bits[4:])], [2, 0])["signal"]
    assert signal.hidden_ND.dtype is torch.bfloat16
    assert torch.equal(signal.hidden_ND, hidden_ND[[4, 5, 0, 1, 2]])
