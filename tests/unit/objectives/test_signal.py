"""The statistic `signal` of every objective: how far the teacher is from the student, per token, in float64."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import Problem, losses_of, random_problem
from torch import Tensor

from opd_ray.objectives import PolicyOptions, forward_kl
from opd_ray.objectives.objective import Tail


def sampled_log_ratios(problem: Problem, *, temperature: float = 1.0) -> Tensor:
    log_p_N, log_q_N = (problem.sampled(log(temperature)).detach() for log in (problem.log_p, problem.log_q))
    return (log_p_N - log_q_N).abs() * problem.tokens.mask_N


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_the_sampled_token_at_hand_the_signal_is_its_absolute_log_ratio(temperature: float) -> None:
    problem = random_problem(masked=(2,))
    expected_N = sampled_log_ratios(problem, temperature=temperature)
    for name, options in (
        ("sampled", {"policy": PolicyOptions(reward_clip=0.1, discount=0.5)}),
        ("sampled", {"policy": PolicyOptions(kl_baseline=True)}),
        ("full", {}),
        ("full", {"divergence": forward_kl()}),
        ("support", {"tail": "sampled_corrected"}),
        ("support", {"tail": "sampled_uncorrected"}),
    ):
        signal_N = losses_of(name, problem, temperature=temperature, chunk_tokens=4, **options).stats["signal"]
        torch.testing.assert_close(signal_N, expected_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "none"])
def test_a_support_without_it_gives_the_expectation_over_its_ids(tail: Tail) -> None:
    problem = random_problem(masked=(2,))
    signal = problem.signal("support")
    signal = replace(signal, ids_NK=signal.ids_NK.clone().index_fill(0, torch.tensor([4]), -1))  # one row has no ids
    log_p_NK = problem.log_p().detach().gather(-1, signal.ids_NK.clamp(min=0))
    log_q_NK = signal.logprobs_NK
    if tail == "renormalise":
        log_p_NK, log_q_NK = log_p_NK.log_softmax(-1), log_q_NK.log_softmax(-1)
    expected_N = (log_p_NK.exp() * (log_p_NK - log_q_NK).abs()).sum(-1) * problem.tokens.mask_N
    expected_N[4] = 0
    signal_N = losses_of("support", problem, signal=signal, tail=tail, chunk_tokens=4).stats["signal"]
    torch.testing.assert_close(signal_N, expected_N, rtol=0, atol=1e-12)


def test_the_ids_of_a_class_are_one_outcome_in_the_signal() -> None:
    problem = random_problem()
    class_ = [1, 5, 7]

    def merged(log_NV: Tensor) -> Tensor:
        log_NV = log_NV.detach().clone()
        log_NV[:, class_] = log_NV[:, class_].logsumexp(-1, keepdim=True)
        return problem.sampled(log_NV)

    expected_N = (merged(problem.log_p()) - merged(problem.log_q())).abs()
    signal_N = losses_of("full", problem, equivalent_ids=(tuple(class_),)).stats["signal"]
    torch.testing.assert_close(signal_N, expected_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sampled", "full"])
def test_a_reward_is_negative_where_the_teacher_thinks_less_of_the_sampled_token(name: str) -> None:
    problem = random_problem(masked=(2,))
    log_p_N, log_q_N = problem.sampled(problem.log_p()).detach(), problem.sampled(problem.log_q())
    expected_N = ((log_q_N < log_p_N) & problem.tokens.mask_N).double()
    assert 0 < expected_N.sum() < problem.tokens.mask_N.sum()
    assert torch.equal(losses_of(name, problem, chunk_tokens=4).stats["negative_reward"], expected_N)
