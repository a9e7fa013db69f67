import numpy as np
import pytest
import torch

from opd_ray.protocol import HiddenScore, Payload, SampledScore, SupportScore
from workers.support_codec import pack_support, support_ids
from workers.teacher.head import HeadScores
from workers.teacher.messages import build_score, num_bytes, to_numpy

SAID = HeadScores(
    ids_NK=torch.tensor([[3, -1], [0, 70_000]], dtype=torch.int32),
    logprobs_NK=torch.tensor([[-1.0, -9.0], [-3.0, -4.0]]),
    sampled_logprobs_N=torch.tensor([-5.0, -6.0]),
    dropped_mass_N=torch.zeros(2),
)
STATES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_every_payload_carries_its_own_part_of_what_the_head_says():
    one = build_score(Payload.sampled, STATES, SAID)
    assert isinstance(one, SampledScore)
    assert one.logprobs_N.tolist() == [-5, -6]
    support = build_score(Payload.support, STATES, SAID)
    assert isinstance(support, SupportScore)
    assert support_ids(support).tolist() == [[3, -1], [0, 70_000]]
    assert support.logprobs_NK.tolist() == [[-1, -np.inf], [-3, -4]]
    assert support.sampled_logprobs_N.tolist() == [-5, -6]
    hidden = build_score(Payload.hidden, STATES, SAID)
    assert isinstance(hidden, HiddenScore)
    assert hidden.hidden_ND.tolist() == STATES.tolist()
    assert hidden.sampled_logprobs_N.tolist() == [-5, -6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_travel_as_contiguous_float32(dtype: torch.dtype):
    states = torch.randn(4, 6).to(dtype).T
    array = to_numpy(states)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, states.float().numpy())


def test_bfloat16_states_travel_as_their_bits():
    states = torch.randn(4, 6).to(torch.bfloat16).T
    array = to_numpy(states)
    assert array.dtype == np.uint16
    assert torch.equal(torch.from_numpy(array.copy()).view(torch.bfloat16), states)


def test_the_size_of_a_score_is_that_of_its_arrays():
    ids_NK, hidden_ND = np.zeros((5, 3), dtype=np.int32), np.zeros((5, 8), dtype=np.uint16)
    none, sampled = np.zeros(0, dtype=np.float32), np.zeros(5, dtype=np.float32)
    logprobs_NK = ids_NK.astype(np.float32)
    assert num_bytes(SampledScore(logprobs_N=sampled)) == 20
    assert num_bytes(pack_support(ids_NK, logprobs_NK, sampled_logprobs_N=none)) == 5 * 3 * 6
    assert num_bytes(pack_support(ids_NK, logprobs_NK, sampled_logprobs_N=sampled)) == 5 * 3 * 6 + 20
    assert num_bytes(pack_support(ids_NK + 140_000, logprobs_NK, sampled_logprobs_N=none)) == 5 * (3 * 6 + 4)
    assert num_bytes(HiddenScore(hidden_ND=hidden_ND, sampled_logprobs_N=none)) == 80
    assert num_bytes(HiddenScore(hidden_ND=hidden_ND, sampled_logprobs_N=sampled)) == 100
