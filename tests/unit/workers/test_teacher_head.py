import numpy as np
import pytest
import torch

from opd_ray.protocol import HiddenScore, SampledScore, SupportScore
from workers.teacher.head import sampled_logprobs, top_k
from workers.teacher.worker import num_bytes, to_numpy

NUM_ROWS, HIDDEN_SIZE = 40, 8


def make_case(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_ND = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)
    head_VD = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator).to(dtype)
    return hidden_ND, head_VD, torch.randint(NUM_ROWS, (num_tokens,), generator=generator)


def naive_logprobs(hidden_ND: torch.Tensor, head_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    return (hidden_ND.double() @ head_VD.double().T / temperature).log_softmax(-1)


@pytest.mark.parametrize("num_tokens", [1, 5, 512, 513, 1100])  # a chunk holds 512
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_the_whole_vocabulary_at_the_temperature(num_tokens: int, temperature: float):
    hidden_ND, head_VD, ids_N = make_case(num_tokens)
    given_N = sampled_logprobs(hidden_ND, head_VD, ids_N, temperature=temperature)
    expected_N = naive_logprobs(hidden_ND, head_VD, temperature).gather(1, ids_N[:, None]).squeeze(1)
    assert given_N.dtype is torch.float32
    torch.testing.assert_close(given_N.double(), expected_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 512, 513])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_k_gives_the_likeliest_tokens_and_their_logprobs_over_the_whole_vocabulary(
    num_tokens: int, temperature: float
):
    hidden_ND, head_VD, _ = make_case(num_tokens)
    ids_NK, logprobs_NK = top_k(hidden_ND, head_VD, num_tokens=6, temperature=temperature)
    expected_NK, expected_ids_NK = naive_logprobs(hidden_ND, head_VD, temperature).topk(6)
    assert (ids_NK.dtype, logprobs_NK.dtype) == (torch.int32, torch.float32)
    assert torch.equal(ids_NK.long(), expected_ids_NK)
    torch.testing.assert_close(logprobs_NK.double(), expected_NK, atol=1e-5, rtol=1e-5)


def test_bfloat16_states_and_head_are_multiplied_in_float32():
    hidden_ND, head_VD, ids_N = make_case(7, torch.bfloat16)
    given_N = sampled_logprobs(hidden_ND, head_VD, ids_N, temperature=1.0)
    expected_N = naive_logprobs(hidden_ND, head_VD, 1.0).gather(1, ids_N[:, None]).squeeze(1)
    torch.testing.assert_close(given_N.double(), expected_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_top", [1, 6, NUM_ROWS])
def test_the_probabilities_add_up_to_one_over_the_whole_vocabulary_only(num_top: int):
    hidden_ND, head_VD, _ = make_case(9)
    _, logprobs_NK = top_k(hidden_ND, head_VD, num_tokens=num_top, temperature=1.0)
    gap = 1 - float(logprobs_NK.exp().sum(-1).min())
    assert abs(gap) < 1e-5 if num_top == NUM_ROWS else gap > 0.01


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
    ids_NK = np.zeros((5, 3), dtype=np.int32)
    assert num_bytes(SampledScore(logprobs_N=np.zeros(5, dtype=np.float32))) == 20
    assert num_bytes(SupportScore(ids_NK=ids_NK, logprobs_NK=ids_NK.astype(np.float32))) == 120
    assert num_bytes(HiddenScore(hidden_ND=np.zeros((5, 8), dtype=np.uint16))) == 80
