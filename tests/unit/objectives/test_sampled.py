"""The sampled objective against the enumeration of every sequence."""

import pytest
import torch
from objective_oracles import Enumeration, enumerate_sequences, random_problem

from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, SampledSignal

SIZES = [(3, 3), (4, 2)]


def sequence_losses(problem: Enumeration, *, discount: float) -> torch.Tensor:
    """Loss of each enumerated sequence, [S]."""
    losses = OBJECTIVES["sampled"].token_losses(
        problem.hidden_ND,
        problem.head_VD,
        tokens=problem.tokens,
        signal=problem.signal,
        options=ObjectiveOptions(discount=discount),
    )
    return losses.loss_N.view_as(problem.ids_ST).sum(-1)


def whole_sequence_losses(problem: Enumeration) -> torch.Tensor:
    """The same with the cost of the whole sequence at each token: the plain sequence-level estimator."""
    log_p_ST = problem.log_p_ST()
    cost_S1 = (log_p_ST.detach() - problem.log_q_ST).sum(-1, keepdim=True)
    return (cost_S1 * log_p_ST).sum(-1)


def expected_gradient(problem: Enumeration, losses_S: torch.Tensor) -> torch.Tensor:
    probability_S = problem.log_p_ST().sum(-1).exp().detach()
    return problem.gradient((probability_S * losses_S).sum())


def variance(problem: Enumeration, losses_S: torch.Tensor) -> torch.Tensor:
    probability_S = problem.log_p_ST().sum(-1).exp().detach()
    gradients_SX = torch.stack([problem.gradient(loss) for loss in losses_S])
    deviations_SX = gradients_SX - probability_S @ gradients_SX
    return probability_S @ deviations_SX.square().sum(-1)


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_causal_and_whole_sequence_costs_have_the_gradient_of_the_sequence_kl(vocab_size: int, length: int) -> None:
    problem = enumerate_sequences(vocab_size=vocab_size, length=length)
    exact = problem.gradient(problem.sequence_kl())
    causal = expected_gradient(problem, sequence_losses(problem, discount=1.0))
    whole = expected_gradient(problem, whole_sequence_losses(problem))
    assert exact.norm() > 0.1
    torch.testing.assert_close(causal, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_without_discounted_future_the_gradient_is_that_of_the_kl_at_fixed_prefixes(
    vocab_size: int, length: int
) -> None:
    problem = enumerate_sequences(vocab_size=vocab_size, length=length)
    token_level = expected_gradient(problem, sequence_losses(problem, discount=0.0))
    torch.testing.assert_close(token_level, problem.gradient(problem.prefix_kl()), rtol=0, atol=1e-9)
    assert (token_level - problem.gradient(problem.sequence_kl())).norm() > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_causal_costs_have_less_variance_than_whole_sequence_costs(seed: int) -> None:
    problem = enumerate_sequences(vocab_size=3, length=3, seed=seed)
    causal = variance(problem, sequence_losses(problem, discount=1.0))
    whole = variance(problem, whole_sequence_losses(problem))
    assert causal <= whole


def test_one_step_down_the_expected_gradient_lowers_the_sequence_kl() -> None:
    problem = enumerate_sequences(vocab_size=3, length=3)
    before = problem.sequence_kl().detach()
    expected_loss = (problem.log_p_ST().sum(-1).exp().detach() * sequence_losses(problem, discount=1.0)).sum()
    table_gradient, head_gradient = torch.autograd.grad(expected_loss, (problem.table_CD, problem.head_VD))
    with torch.no_grad():
        problem.table_CD.sub_(1e-3 * table_gradient)
        problem.head_VD.sub_(1e-3 * head_gradient)
    assert problem.sequence_kl() < before


def test_expected_divergence_at_a_prefix_is_its_kl() -> None:
    problem = enumerate_sequences(vocab_size=4, length=1)
    losses = OBJECTIVES["sampled"].token_losses(
        problem.hidden_ND,
        problem.head_VD,
        tokens=problem.tokens,
        signal=problem.signal,
        options=ObjectiveOptions(),
    )
    expected = (problem.log_p_ST().squeeze(-1).exp() * losses.divergence_N).sum()
    torch.testing.assert_close(expected, problem.sequence_kl())


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_gradient_depends_on_the_teacher(discount: float) -> None:
    """Trap 2: back-propagating the log-ratio as a loss gives the same gradient for every teacher."""
    problem = random_problem(dtype=torch.float64)
    gradients, wrong_gradients = [], []
    for shift in (0.0, 1.0):
        logprobs_N = problem.signal("sampled").logprobs_N.double() - shift * torch.arange(11)
        losses = OBJECTIVES["sampled"].token_losses(
            problem.hidden_ND,
            problem.head_VD,
            tokens=problem.tokens,
            signal=SampledSignal(logprobs_N=logprobs_N),
            options=ObjectiveOptions(discount=discount),
        )
        gradients.append(torch.autograd.grad(losses.loss_N.sum(), problem.hidden_ND)[0])
        log_p_N = (problem.hidden_ND @ problem.head_VD.T).log_softmax(-1)[torch.arange(11), problem.tokens.ids_N]
        wrong_gradients.append(torch.autograd.grad((log_p_N - logprobs_N).sum(), problem.hidden_ND)[0])
    assert torch.equal(wrong_gradients[0], wrong_gradients[1])
    assert (gradients[0] - gradients[1]).norm() > 0.1


@pytest.mark.parametrize("discount", [-0.1, 1.5, float("nan")])
def test_a_discount_outside_zero_and_one_is_refused_by_its_key(discount: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.discount = {discount}: expected a number in \[0, 1\]"):
        ObjectiveOptions(discount=discount)
