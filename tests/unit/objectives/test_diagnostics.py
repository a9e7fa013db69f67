"""Diagnostics of the leading tokens, and the selection of tokens by entropy, against direct computation."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import VARIANTS, Problem, assert_close, gradients, losses_of, random_problem
from torch import Tensor

from opd_ray.objectives import ObjectiveOptions, PolicyOptions, keep_high_entropy

MASKED = (0, 3)


def entropy(problem: Problem, temperature: float = 1.0) -> Tensor:
    log_p_NV = problem.log_p(temperature).detach()
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


@pytest.mark.parametrize("num_tokens", [1, 6, 11, 100])
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_leading_tokens_get_statistics_of_the_whole_vocabulary(name: str, options: dict, num_tokens: int) -> None:
    problem = random_problem(masked=MASKED)
    signal = problem.signal("support", temperature=0.7) if name == "support" else None
    losses = losses_of(
        name, problem, signal=signal, diagnostic_tokens=num_tokens, temperature=0.7, chunk_tokens=4, **options
    )
    expected = {
        "sampled_logprob": problem.sampled(problem.log_p(0.7).detach()),
        "student_entropy": entropy(problem, 0.7),
    }
    if name == "support" and "equivalent_ids" in options:
        expected["support_student_mass"] = losses.diagnostics["support_student_mass"]
    elif name == "support":
        expected["support_student_mass"] = problem.log_p(0.7).detach().exp().gather(-1, signal.ids_NK).sum(-1)
    mask_N = problem.tokens.mask_N
    expected = {key: (tensor * mask_N[: len(tensor)])[:num_tokens] for key, tensor in expected.items()}
    assert_close(losses.diagnostics, expected, 1e-12)


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_diagnostics_change_nothing_else_and_may_be_left_out(name: str, options: dict) -> None:
    problem = random_problem(masked=MASKED)
    plain, diagnosed = (losses_of(name, problem, diagnostic_tokens=number, **options) for number in (0, 6))
    assert plain.diagnostics == {}
    assert torch.equal(plain.loss_N, diagnosed.loss_N)
    pairs = zip(gradients(plain.loss, problem), gradients(diagnosed.loss, problem), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_ids_outside_the_common_vocabulary_carry_no_mass() -> None:
    problem = random_problem()
    signal = problem.signal("support")
    ids_NK = signal.ids_NK.clone()
    ids_NK[:, 1], ids_NK[:, 3] = -1, 12
    losses = losses_of("support", problem, signal=replace(signal, ids_NK=ids_NK), diagnostic_tokens=11)
    expected_N = problem.log_p().detach().exp().gather(-1, signal.ids_NK[:, [0, 2]]).sum(-1)
    torch.testing.assert_close(losses.diagnostics["support_student_mass"], expected_N, rtol=0, atol=1e-12)


def selected(problem: Problem, fraction: float, *, temperature: float = 1.0) -> Problem:
    options = ObjectiveOptions(
        entropy_fraction=fraction, vocab_size=problem.vocab_size, temperature=temperature, chunk_tokens=4
    )
    tokens = keep_high_entropy(problem.hidden_ND, problem.head_VD, tokens=problem.tokens, options=options)
    return replace(problem, tokens=tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_only_the_tokens_of_highest_entropy_in_each_sequence_keep_their_weight(temperature: float) -> None:
    problem = random_problem(masked=MASKED)
    tokens = selected(problem, 0.5, temperature=temperature).tokens
    entropy_N = entropy(problem, temperature)
    expected = set()
    for kept, number in (([1, 2], 1), ([4], 1), ([5, 6, 7, 8, 9, 10], 3)):
        expected |= set(sorted(kept, key=lambda row: -float(entropy_N[row]))[:number])
    weights_N = problem.tokens.weights_N
    assert set(tokens.weights_N.nonzero().flatten().tolist()) == expected
    assert torch.equal(tokens.weights_N[list(expected)], weights_N[list(expected)])
    assert torch.equal(tokens.mask_N, problem.tokens.mask_N)


def test_a_fraction_of_one_costs_and_changes_nothing() -> None:
    problem = random_problem()
    assert selected(problem, 1.0).tokens is problem.tokens


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_tokens_of_low_entropy_lose_their_gradient_and_still_count_in_returns(name: str, options: dict) -> None:
    problem = random_problem(masked=MASKED)
    chosen = selected(problem, 0.4)
    losses, plain = losses_of(name, chosen, **options), losses_of(name, problem, **options)
    assert torch.equal(losses.loss_N, plain.loss_N)
    hidden_gradient, _ = gradients(losses.loss, problem)
    dropped_N = chosen.tokens.weights_N == 0
    assert hidden_gradient[dropped_N].abs().max() == 0
    plain_gradient, _ = gradients(plain.loss, problem)
    torch.testing.assert_close(hidden_gradient[~dropped_N], plain_gradient[~dropped_N], rtol=0, atol=1e-12)


def test_no_gradient_flows_through_the_selection() -> None:
    assert not selected(random_problem(), 0.5).tokens.weights_N.requires_grad


def test_the_diagnosed_log_prob_is_raw_also_where_the_policy_is_a_nucleus() -> None:
    problem = random_problem()
    losses = losses_of("sampled", problem, policy=PolicyOptions(top_p=0.5), diagnostic_tokens=11)
    expected_N = problem.sampled(problem.log_p().detach())
    torch.testing.assert_close(losses.diagnostics["sampled_logprob"], expected_N, rtol=0, atol=1e-12)
    assert (losses.sampled_logprobs_N > expected_N).any()
