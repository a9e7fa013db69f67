"""The expected gradient of `sampled`, with every sequence enumerated: exact, no Monte Carlo."""

import itertools
from dataclasses import replace

import pytest
import torch
from objective_enumeration import Enumeration, enumerate_sequences
from objective_oracles import naive_returns

from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions, SampledSignal, Tokens
from opd_ray.objectives.weights import leave_one_out_returns

SIZES = [(3, 3), (4, 2)]


def expected_gradient(problem: Enumeration, *, discount: float, **arguments: object) -> torch.Tensor:
    options = {"policy": PolicyOptions(discount=discount), **arguments}
    return problem.gradient(problem.losses("sampled", **options).loss)


def whole_sequence_tokens(problem: Enumeration) -> Tokens:
    """The cost of the whole sequence at each token: the plain sequence-level estimator, at discount 0."""
    costs_ST = (problem.log_p_ST().detach() - problem.log_q_ST).sum(-1, keepdim=True).expand_as(problem.ids_ST)
    return problem.with_costs(costs_ST)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_causal_costs_have_the_gradient_of_the_sequence_kl(vocab_size: int, length: int) -> None:
    problem = enumerate_sequences(vocab_size=vocab_size, length=length)
    exact = problem.gradient(problem.sequence_kl())
    assert exact.norm() > 0.1
    assert_equal(expected_gradient(problem, discount=1.0), exact)


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_the_literal_sequence_level_estimator_has_the_same_expectation(vocab_size: int, length: int) -> None:
    problem = enumerate_sequences(vocab_size=vocab_size, length=length)
    exact = problem.gradient(problem.sequence_kl())
    assert_equal(expected_gradient(problem, discount=0.0, tokens=whole_sequence_tokens(problem)), exact)
    log_p_ST = problem.log_p_ST()
    cost_S1 = (log_p_ST.detach() - problem.log_q_ST).sum(-1, keepdim=True)
    assert_equal(problem.gradient((problem.probability_S()[:, None] * cost_S1 * log_p_ST).sum()), exact)


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_without_discounted_future_the_gradient_is_that_of_the_kl_at_fixed_prefixes(
    vocab_size: int, length: int
) -> None:
    problem = enumerate_sequences(vocab_size=vocab_size, length=length)
    token_level = expected_gradient(problem, discount=0.0)
    assert_equal(token_level, problem.gradient(problem.prefix_kl()))
    assert (token_level - problem.gradient(problem.sequence_kl())).norm() > 0.1


def test_the_full_objective_is_the_token_level_gradient_without_its_noise() -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    full = problem.gradient(problem.losses("full", signal=problem.hidden_signal).loss)
    assert_equal(full, expected_gradient(problem, discount=0.0))


@pytest.mark.parametrize("seed", range(3))
def test_the_bias_falls_as_the_discount_rises(seed: int) -> None:
    problem = enumerate_sequences(vocab_size=3, length=3, seed=seed)
    exact = problem.gradient(problem.sequence_kl())
    bias = [float((expected_gradient(problem, discount=d) - exact).norm()) for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(later < earlier for earlier, later in itertools.pairwise(bias))
    assert bias[-1] < 1e-9


@pytest.mark.parametrize("discount", [0.3, 0.8])
def test_a_discounted_gradient_is_the_literal_double_sum(discount: float) -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    log_p_ST = problem.log_p_ST()
    cost_N = (log_p_ST.detach() - problem.log_q_ST).flatten()
    returns_N = naive_returns(cost_N, offsets=problem.tokens.offsets, discount=discount)
    literal = problem.gradient((problem.tokens.weights_N * returns_N * log_p_ST.flatten()).sum())
    assert_equal(expected_gradient(problem, discount=discount), literal)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_kl_baseline_leaves_the_expectation_unchanged(discount: float) -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    policy = PolicyOptions(discount=discount, kl_baseline=True)
    losses = problem.losses("sampled", signal=problem.hidden_signal, policy=policy)
    plain = problem.losses("sampled", policy=PolicyOptions(discount=discount))
    log_p_CV = problem.log_p_CV().detach()
    kl_C = (log_p_CV.exp() * (log_p_CV - problem.log_q_CV)).sum(-1)
    assert_equal(losses.loss_N, plain.loss_N - kl_C[problem.contexts_ST].flatten())
    assert_equal(problem.gradient(losses.loss), expected_gradient(problem, discount=discount))


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_a_constant_baseline_leaves_the_expectation_unchanged(discount: float) -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    tokens = replace(problem.tokens, advantages_N=torch.full((81,), 1.7, dtype=torch.float64))
    moved = expected_gradient(problem, discount=discount, tokens=tokens)
    assert_equal(moved, expected_gradient(problem, discount=discount))


def test_a_baseline_of_the_prefix_leaves_the_expectation_unchanged() -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    baseline_C = torch.randn(13, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = replace(problem.tokens, advantages_N=baseline_C[problem.contexts_ST].flatten())
    assert_equal(expected_gradient(problem, discount=1.0, tokens=tokens), expected_gradient(problem, discount=1.0))


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_mean_of_the_others_in_the_group_leaves_the_expectation_unchanged(discount: float) -> None:
    """Every pair of sequences is a group of two; its weight is the probability to sample that pair."""
    problem = enumerate_sequences(vocab_size=3, length=2)
    first_P, second_P = torch.cartesian_prod(torch.arange(9), torch.arange(9)).unbind(1)
    sequence_B = torch.stack([first_P, second_P], dim=1).flatten()
    probability_P = problem.probability_S()[first_P] * problem.probability_S()[second_P]
    contexts_BT = problem.contexts_ST[sequence_B]
    offsets = torch.arange(len(sequence_B) + 1) * 2
    costs_N = (problem.log_p_ST().detach() - problem.log_q_ST)[sequence_B].flatten()
    returns_N = naive_returns(costs_N, offsets=offsets, discount=discount)
    baseline_N = leave_one_out_returns(returns_N, offsets=offsets, group_B=torch.arange(81).repeat_interleave(2))
    assert baseline_N.std() > 0.1
    losses = OBJECTIVES["sampled"].losses(
        problem.table_CD[contexts_BT.flatten()],
        problem.head_VD,
        tokens=Tokens(
            ids_N=problem.ids_ST[sequence_B].flatten(),
            offsets=offsets,
            mask_N=torch.ones(len(costs_N), dtype=torch.bool),
            weights_N=probability_P.repeat_interleave(4) / 2,
            sampler_logprobs_N=torch.zeros_like(costs_N),
            advantages_N=baseline_N,
        ),
        signal=SampledSignal(logprobs_N=problem.log_q_ST[sequence_B].flatten()),
        options=ObjectiveOptions(policy=PolicyOptions(discount=discount)),
    )
    torch.testing.assert_close(losses.loss_N, returns_N - baseline_N, rtol=0, atol=1e-12)
    assert_equal(problem.gradient(losses.loss), expected_gradient(problem, discount=discount))


def test_a_task_reward_as_advantage_adds_its_own_policy_gradient() -> None:
    """The advantage is the reward: descending the loss raises it."""
    problem = enumerate_sequences(vocab_size=3, length=3)
    reward_S = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = replace(problem.tokens, advantages_N=reward_S.repeat_interleave(3))
    expected_reward = (problem.log_p_ST().sum(-1).exp() * reward_S).sum()
    exact = problem.gradient(problem.sequence_kl() - expected_reward)
    assert_equal(expected_gradient(problem, discount=1.0, tokens=tokens), exact)


@pytest.mark.parametrize("seed", range(3))
def test_causal_costs_have_less_variance_than_whole_sequence_costs(seed: int) -> None:
    problem = enumerate_sequences(vocab_size=3, length=3, seed=seed)
    causal = problem.variance(problem.tokens, policy=PolicyOptions(discount=1.0))
    assert causal < problem.variance(whole_sequence_tokens(problem))


def test_one_step_down_the_expected_gradient_lowers_the_sequence_kl() -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    before = problem.sequence_kl().detach()
    loss = problem.losses("sampled", policy=PolicyOptions(discount=1.0)).loss
    table_gradient, head_gradient = torch.autograd.grad(loss, (problem.table_CD, problem.head_VD))
    with torch.no_grad():
        problem.table_CD.sub_(1e-3 * table_gradient)
        problem.head_VD.sub_(1e-3 * head_gradient)
    assert problem.sequence_kl() < before


def test_the_expected_divergence_at_the_prefixes_is_their_kl() -> None:
    problem = enumerate_sequences(vocab_size=4, length=2)
    tokens = replace(problem.tokens, advantages_N=torch.ones(32, dtype=torch.float64))
    policy = PolicyOptions(discount=1.0, reward_clip=0.1)
    divergence_N = problem.losses("sampled", tokens=tokens, policy=policy).divergence_N
    assert_equal((tokens.weights_N * divergence_N).sum(), problem.sequence_kl().detach())
