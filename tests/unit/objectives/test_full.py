"""The full objective against its formula by autograd, closed form and finite differences, in float64."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import (
    CASES,
    Case,
    assert_agrees,
    assert_is_slope,
    gradients,
    losses_of,
    naive_full,
    random_problem,
)
from torch import Tensor

from opd_ray.objectives import OBJECTIVES, HiddenSignal, ObjectiveOptions


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_are_those_of_the_formula(case: Case, temperature: float) -> None:
    problem = random_problem(masked=(2,))
    losses = losses_of("full", problem, divergence=case.divergence, temperature=temperature, chunk_tokens=4)
    naive_N = naive_full(problem, terms=case.terms, temperature=temperature)
    assert_agrees(losses, naive_N, problem, tolerance=1e-12)
    assert torch.equal(losses.divergence_N, losses.loss_N)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_agree_with_finite_differences(case: Case) -> None:
    problem = random_problem(masked=(2,))
    loss = losses_of("full", problem, divergence=case.divergence).loss

    def value(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        return losses_of(
            "full", replace(problem, hidden_ND=hidden_ND, head_VD=head_VD), divergence=case.divergence
        ).loss

    assert_is_slope(gradients(loss, problem), value, problem.leaves())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_the_identity_as_head_the_gradient_is_the_closed_form(temperature: float) -> None:
    problem = random_problem()
    logits_NV = torch.randn(11, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    eye = torch.eye(12, dtype=torch.float64)
    problem = replace(problem, hidden_ND=logits_NV.requires_grad_(), head_VD=eye.requires_grad_())
    losses = losses_of("full", problem, temperature=temperature)
    p_NV, q_NV = (logits_NV.detach() / temperature).softmax(-1), problem.log_q(temperature).exp()
    kl_N = (p_NV * (p_NV / q_NV).log()).sum(-1)
    expected_NV = p_NV * ((p_NV / q_NV).log() - kl_N[:, None]) / temperature
    torch.testing.assert_close(losses.loss_N, kl_N, rtol=0, atol=1e-12)
    weighted_NV = problem.tokens.weights_N[:, None] * expected_NV
    torch.testing.assert_close(gradients(losses.loss, problem)[0], weighted_NV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(case: Case) -> None:
    problem = random_problem()
    signal = HiddenSignal(hidden_ND=problem.hidden_ND.detach(), head_VD=problem.head_VD.detach())
    losses = losses_of("full", problem, signal=signal, divergence=case.divergence, chunk_tokens=3)
    for tensor in (losses.loss_N, *gradients(losses.loss, problem)):
        assert tensor.abs().max() < 1e-15


@pytest.mark.parametrize("poisoned", ["student", "teacher"])
def test_rows_beyond_the_common_vocabulary_change_nothing(poisoned: str) -> None:
    """Trap 8: heads are padded to different sizes; the padding must not enter either softmax."""
    problem = random_problem()
    results = []
    for scale in (1.0, 100.0):
        head_VD, teacher_head_VD = problem.head_VD.detach().clone(), problem.teacher_head_VD.clone()
        {"student": head_VD, "teacher": teacher_head_VD}[poisoned][problem.vocab_size :] *= scale
        padded = replace(problem, head_VD=head_VD.requires_grad_(), teacher_head_VD=teacher_head_VD)
        losses = losses_of("full", padded)
        hidden_gradient, head_gradient = gradients(losses.loss, padded)
        assert torch.equal(head_gradient[problem.vocab_size :], torch.zeros(1, 5, dtype=torch.float64))
        results.append((losses.loss_N, losses.sampled_logprobs_N, hidden_gradient, head_gradient))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_without_a_vocabulary_size_the_smaller_head_sets_the_range(larger: str) -> None:
    problem = random_problem()
    if larger == "student":
        problem = replace(problem, teacher_head_VD=problem.teacher_head_VD[:12])
    smallest = min(len(problem.head_VD), len(problem.teacher_head_VD))
    default, explicit = (losses_of("full", problem, vocab_size=size).loss_N for size in (0, smallest))
    assert torch.equal(default, explicit)


def test_a_vocabulary_beyond_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size = 14: expected at most 13"):
        losses_of("full", random_problem(), vocab_size=14)


def test_no_gradient_reaches_the_teacher() -> None:
    problem = random_problem()
    teacher = [problem.teacher_hidden_ND.requires_grad_(), problem.teacher_head_VD.requires_grad_()]
    losses = losses_of("full", problem)
    assert torch.autograd.grad(losses.loss, teacher, allow_unused=True) == (None, None)


def test_the_payload_is_the_teachers_hidden_states() -> None:
    assert OBJECTIVES["full"].payload(ObjectiveOptions()) == "hidden"
