"""Each divergence against its formula by autograd, closed forms and limits, in float64."""

import math

import pytest
import torch
from objective_oracles import CASES, Case, assert_is_slope
from torch import Tensor

from opd_ray.objectives import Divergence, forward_kl, generalised_jsd, mixed_kl, reverse_kl, skewed_reverse_kl
from opd_ray.objectives.divergences import ABSENT

NUM_TOKENS, VOCAB = 6, 5


def random_logits(seed: int, *, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(NUM_TOKENS, VOCAB, generator=generator, dtype=torch.float64)


def on_logits(divergence: Divergence, logits_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    return divergence(logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1))


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradient_in_the_logits_are_those_of_the_formula(case: Case, scale: float) -> None:
    logits_NV, teacher_NV = random_logits(0, scale=scale).requires_grad_(), random_logits(1, scale=scale)
    value_N, gradient_NV = on_logits(case.divergence, logits_NV.detach(), teacher_NV)
    formula_N = case.terms(logits_NV.softmax(-1), teacher_NV.softmax(-1)).sum(-1)
    torch.testing.assert_close(value_N, formula_N.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_NV, torch.autograd.grad(formula_N.sum(), logits_NV)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradient_agrees_with_finite_differences(case: Case) -> None:
    logits_NV, teacher_NV = random_logits(0), random_logits(1)

    def value(logits_NV: Tensor) -> Tensor:
        return on_logits(case.divergence, logits_NV, teacher_NV)[0].sum()

    assert_is_slope([on_logits(case.divergence, logits_NV, teacher_NV)[1]], value, [logits_NV])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_term_has_the_derivative_slope_plus_constant_times_p(case: Case) -> None:
    """Also where p does not add up to 1, as on a support."""
    log_p_NV, log_q_NV = random_logits(0) - 3, random_logits(1) - 3
    log_p_NV.requires_grad_()
    phi_NV, slope_NV = case.divergence.terms(log_p_NV.detach(), log_q_NV)
    formula_NV = case.terms(log_p_NV.exp(), log_q_NV.exp())
    torch.testing.assert_close(phi_NV, formula_NV.detach(), rtol=0, atol=1e-12)
    (expected_NV,) = torch.autograd.grad(formula_NV.sum(), log_p_NV)
    actual_NV = slope_NV + case.divergence.constant * log_p_NV.detach().exp()
    torch.testing.assert_close(actual_NV, expected_NV, rtol=0, atol=1e-12)


def test_the_reverse_kl_has_its_closed_form() -> None:
    logits_NV, teacher_NV = random_logits(0), random_logits(1)
    p_NV, q_NV = logits_NV.softmax(-1), teacher_NV.softmax(-1)
    kl_N = (p_NV * (p_NV / q_NV).log()).sum(-1)
    value_N, gradient_NV = on_logits(reverse_kl(), logits_NV, teacher_NV)
    torch.testing.assert_close(value_N, kl_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_NV, p_NV * ((p_NV / q_NV).log() - kl_N[:, None]), rtol=0, atol=1e-12)


def test_the_forward_kl_has_its_closed_form() -> None:
    logits_NV, teacher_NV = random_logits(0), random_logits(1)
    p_NV, q_NV = logits_NV.softmax(-1), teacher_NV.softmax(-1)
    value_N, gradient_NV = on_logits(forward_kl(), logits_NV, teacher_NV)
    torch.testing.assert_close(value_N, (q_NV * (q_NV / p_NV).log()).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_NV, p_NV - q_NV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_equal_models_give_no_loss_and_no_gradient(name: str, dtype: torch.dtype) -> None:
    """To the last bit, but for the rounding of log(beta q + (1 - beta) p)."""
    logits_NV = random_logits(0, scale=3).to(dtype)
    value_N, gradient_NV = on_logits(CASES[name].divergence, logits_NV, logits_NV.clone())
    is_mixture = name in ("jsd 0.1", "jsd 0.5", "jsd 0.9", "skewed 0.1", "skewed 0.7")
    tolerance = torch.finfo(dtype).eps if is_mixture else 0
    assert value_N.abs().max() <= tolerance
    assert gradient_NV.abs().max() <= tolerance


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_divergence_is_negative_or_zero_for_different_models(case: Case) -> None:
    value_N, _ = on_logits(case.divergence, random_logits(0), random_logits(1))
    assert value_N.min() > 1e-4


def test_the_jensen_shannon_divergence_tends_to_the_two_kls() -> None:
    """The convention: beta -> 0 is the forward KL of the student, beta -> 1 the reverse."""
    logits_NV, teacher_NV = random_logits(0), random_logits(1)
    small = 1e-6
    for divergence, kl in (
        (generalised_jsd(small), forward_kl()),
        (generalised_jsd(1 - small), reverse_kl()),
    ):
        limits = on_logits(divergence, logits_NV, teacher_NV)
        for limit, expected in zip(limits, on_logits(kl, logits_NV, teacher_NV), strict=True):
            torch.testing.assert_close(limit / small, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9])
def test_the_jensen_shannon_divergence_is_symmetric_under_exchange_of_models_and_beta(beta: float) -> None:
    p_NV, q_NV = random_logits(0), random_logits(1)
    there, _ = on_logits(generalised_jsd(beta), p_NV, q_NV)
    back, _ = on_logits(generalised_jsd(1 - beta), q_NV, p_NV)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_the_jensen_shannon_divergence_at_one_half_is_at_most_log_two(scale: float) -> None:
    disjoint = random_logits(0, scale=scale)
    value_N, gradient_NV = on_logits(generalised_jsd(0.5), disjoint, -disjoint)
    assert value_N.max() <= math.log(2) + 1e-12
    assert gradient_NV.isfinite().all()
    assert scale < 1000 or value_N.max() > math.log(2) - 1e-9


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_a_skewed_kl_is_at_most_minus_log_alpha_where_the_teacher_vanishes(alpha: float) -> None:
    logits_NV = random_logits(0, scale=1000)
    value_N, gradient_NV = on_logits(skewed_reverse_kl(alpha), logits_NV, -logits_NV)
    assert on_logits(reverse_kl(), logits_NV, -logits_NV)[0].min() > 100
    torch.testing.assert_close(value_N, torch.full_like(value_N, -math.log(alpha)), rtol=0, atol=1e-6)
    assert gradient_NV.isfinite().all()


@pytest.mark.parametrize(
    ("divergence", "same"),
    [
        (generalised_jsd(0.0), forward_kl()),
        (generalised_jsd(1.0), reverse_kl()),
        (skewed_reverse_kl(0.0), reverse_kl()),
        (mixed_kl(0.0), reverse_kl()),
        (mixed_kl(1.0), forward_kl()),
    ],
)
def test_at_the_ends_of_their_range_the_families_are_the_two_kls(divergence: Divergence, same: Divergence) -> None:
    assert divergence.constant == same.constant
    results = on_logits(divergence, random_logits(0), random_logits(1))
    for actual, expected in zip(results, on_logits(same, random_logits(0), random_logits(1)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outcomes_absent_on_both_sides_contribute_nothing(case: Case, dtype: torch.dtype) -> None:
    logits_NV, teacher_NV = random_logits(0).to(dtype), random_logits(1).to(dtype)
    absent_NV = logits_NV.new_full((NUM_TOKENS, 2), ABSENT)
    value_N, gradient_NV = on_logits(case.divergence, logits_NV, teacher_NV)
    padded = [torch.cat([absent_NV[:, :1], logits, absent_NV[:, 1:]], -1) for logits in (logits_NV, teacher_NV)]
    padded_value_N, padded_gradient_NV = on_logits(case.divergence, *padded)
    torch.testing.assert_close(padded_value_N, value_N)
    torch.testing.assert_close(padded_gradient_NV[:, 1:-1], gradient_NV)
    assert torch.equal(padded_gradient_NV[:, [0, -1]], torch.zeros(NUM_TOKENS, 2, dtype=dtype))
