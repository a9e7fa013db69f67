"""The support objective against its formula by autograd and finite differences, for every tail, in float64."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import (
    CASES,
    TAILS,
    Case,
    assert_agrees,
    assert_close,
    assert_is_slope,
    gradients,
    losses_of,
    naive_support,
    random_problem,
)
from torch import Tensor

from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, SupportSignal, Tail

TOKENS, VOCAB = 11, 12


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_are_those_of_the_formula(case: Case, tail: Tail) -> None:
    problem = random_problem(masked=(2,))
    signal = problem.signal("support", top_k=4)
    inside_N = (signal.ids_NK == problem.tokens.ids_N[:, None]).any(-1)
    assert 0 < inside_N.sum() < TOKENS  # sampled tokens in S, and outside
    losses = losses_of("support", problem, signal=signal, divergence=case.divergence, tail=tail, chunk_tokens=4)
    assert_agrees(losses, naive_support(problem, signal, tail=tail, terms=case.terms), problem, tolerance=1e-12)
    assert torch.equal(losses.divergence_N, losses.loss_N)


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "none"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_agree_with_finite_differences(case: Case, tail: Tail) -> None:
    problem = random_problem(masked=(2,))
    options = {"divergence": case.divergence, "tail": tail}

    def value(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        return losses_of("support", replace(problem, hidden_ND=hidden_ND, head_VD=head_VD), **options).loss

    loss = losses_of("support", problem, **options).loss
    assert_is_slope(gradients(loss, problem), value, problem.leaves())


@pytest.mark.parametrize("tail", ["sampled_corrected", "sampled_uncorrected"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sampled_tails_agree_with_finite_differences_of_their_surrogate(case: Case, tail: Tail) -> None:
    """rho = p(y) / sg p(y): the probability under the sampler stays where it was."""
    problem = random_problem(masked=(2,))
    signal = problem.signal("support", top_k=4)
    tokens = problem.tokens
    fixed_p_N, q_N = problem.sampled(problem.log_p()).exp().detach(), signal.sampled_logprobs_N.exp()
    outside_N = (signal.ids_NK != tokens.ids_N[:, None]).all(-1)

    def value(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        moved = replace(problem, hidden_ND=hidden_ND, head_VD=head_VD)
        p_NV, p_N = moved.log_p().exp(), moved.sampled(moved.log_p()).exp()
        tail_N = case.terms(p_N, q_N) / fixed_p_N
        if tail == "sampled_uncorrected":
            tail_N = case.terms(fixed_p_N, q_N) / fixed_p_N * p_N / fixed_p_N
        loss_N = case.terms(p_NV.gather(-1, signal.ids_NK), signal.logprobs_NK.exp()).sum(-1) + tail_N * outside_N
        return (tokens.weights_N * tokens.mask_N * loss_N).sum()

    loss = losses_of("support", problem, divergence=case.divergence, tail=tail).loss
    torch.testing.assert_close(loss, value(*problem.leaves()))
    assert_is_slope(gradients(loss, problem), value, problem.leaves())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_renormalised_the_logit_gradient_is_the_closed_form(temperature: float) -> None:
    problem = random_problem()
    logits_NV = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    eye = torch.eye(VOCAB, dtype=torch.float64)
    problem = replace(problem, hidden_ND=logits_NV.requires_grad_(), head_VD=eye)
    signal = problem.signal("support", temperature=temperature)
    losses = losses_of("support", problem, signal=signal, temperature=temperature)
    p_NK = (logits_NV.detach().gather(-1, signal.ids_NK) / temperature).softmax(-1)
    log_ratio_NK = (p_NK / signal.logprobs_NK.softmax(-1)).log()
    value_N = (p_NK * log_ratio_NK).sum(-1)
    slope_NK = problem.tokens.weights_N[:, None] * p_NK * (log_ratio_NK - value_N[:, None]) / temperature
    expected_NV = torch.zeros_like(logits_NV).scatter(-1, signal.ids_NK, slope_NK)
    torch.testing.assert_close(losses.loss_N, value_N, rtol=0, atol=1e-12)
    (gradient_NV,) = torch.autograd.grad(losses.loss, problem.hidden_ND)
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "sampled_corrected", "sampled_uncorrected", "none"])
def test_tails_divide_the_students_logits_by_the_temperature(tail: Tail) -> None:
    problem = random_problem()
    signal = problem.signal("support")
    cooled = losses_of("support", problem, signal=signal, tail=tail, temperature=0.7)
    scaled = replace(problem, hidden_ND=(problem.hidden_ND.detach() / 0.7).requires_grad_())
    expected = losses_of("support", scaled, signal=signal, tail=tail)
    torch.testing.assert_close(cooled.loss_N, expected.loss_N, rtol=0, atol=1e-12)
    (hidden_gradient, head_gradient), (expected_hidden, expected_head) = (
        gradients(losses.loss, each) for losses, each in ((cooled, problem), (expected, scaled))
    )
    torch.testing.assert_close(hidden_gradient, expected_hidden / 0.7, rtol=0, atol=1e-12)
    torch.testing.assert_close(head_gradient, expected_head, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_renormalised_the_logits_outside_the_support_change_nothing(case: Case) -> None:
    problem = random_problem()
    signal = problem.signal("support", top_k=3)
    outside_NV = torch.ones(TOKENS, VOCAB, dtype=torch.bool).scatter(-1, signal.ids_NK, False)
    eye = torch.eye(VOCAB, dtype=torch.float64)
    results = []
    for shift in (0, 50):
        logits_NV = (problem.log_p().detach() + shift * outside_NV).requires_grad_()
        moved = replace(problem, hidden_ND=logits_NV, head_VD=eye)
        losses = losses_of("support", moved, signal=signal, divergence=case.divergence)
        results.append((losses.loss_N, torch.autograd.grad(losses.loss, logits_NV)[0]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert results[0][1][~outside_NV].abs().min() > 0
    assert results[0][1][outside_NV].abs().max() == 0


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tail", TAILS)
def test_the_whole_vocabulary_as_support_gives_the_full_objective(tail: Tail, case: Case) -> None:
    problem = random_problem()
    signal = problem.signal("support", top_k=VOCAB)
    whole, full = (
        losses_of("support", problem, signal=signal, tail=tail, divergence=case.divergence),
        losses_of("full", problem, divergence=case.divergence),
    )
    torch.testing.assert_close(whole.loss_N, full.loss_N, rtol=0, atol=1e-12)
    for actual, expected in zip(gradients(whole.loss, problem), gradients(full.loss, problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(tail: Tail, case: Case) -> None:
    problem = random_problem()
    top = problem.log_p().detach().topk(4, dim=-1)
    signal = SupportSignal(ids_NK=top.indices, logprobs_NK=top.values, sampled_logprobs_N=torch.empty(0))
    losses = losses_of("support", problem, signal=signal, tail=tail, divergence=case.divergence)
    for tensor in (losses.loss_N, *gradients(losses.loss, problem)):
        assert tensor.abs().max() < 1e-15 * 10


def test_renormalised_a_teacher_known_up_to_a_constant_per_token_suffices() -> None:
    problem = random_problem()
    signal = problem.signal("support")
    shifted = replace(signal, logprobs_NK=signal.logprobs_NK + torch.arange(float(TOKENS))[:, None])
    first, second = (losses_of("support", problem, signal=each).loss_N for each in (signal, shifted))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("absent_id", [-1, VOCAB, VOCAB + 1, 10_000])
def test_ids_outside_the_common_vocabulary_are_not_in_the_support(absent_id: int, tail: Tail) -> None:
    """Trap 8: a teacher's padded row may be in its top-K; the student's head has a padded row of its own, 12."""
    problem = random_problem()
    signal = problem.signal("support", top_k=3)
    absent_N1 = torch.full((TOKENS, 1), absent_id)
    for value in (5.0, float("nan")):
        padded = replace(
            signal,
            ids_NK=torch.cat([signal.ids_NK[:, :1], absent_N1, signal.ids_NK[:, 1:]], dim=1),
            logprobs_NK=torch.cat(
                [
                    signal.logprobs_NK[:, :1],
                    torch.full_like(absent_N1, value, dtype=torch.float64),
                    signal.logprobs_NK[:, 1:],
                ],
                dim=1,
            ),
        )
        plain, dropped = (losses_of("support", problem, signal=each, tail=tail) for each in (signal, padded))
        for name in ("loss_N", "sampled_logprobs_N"):
            torch.testing.assert_close(getattr(dropped, name), getattr(plain, name), rtol=0, atol=1e-12)
        assert_close(dropped.stats, plain.stats, 1e-12)
        for actual, expected in zip(gradients(dropped.loss, problem), gradients(plain.loss, problem), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_of_the_head_beyond_the_common_vocabulary_change_nothing(tail: Tail) -> None:
    problem = random_problem()
    signal = problem.signal("support")
    results = []
    for scale in (1.0, 100.0):
        head_VD = problem.head_VD.detach().clone()
        head_VD[VOCAB:] *= scale
        padded = replace(problem, head_VD=head_VD.requires_grad_())
        losses = losses_of("support", padded, signal=signal, tail=tail)
        results.append((losses.loss_N, losses.sampled_logprobs_N, *gradients(losses.loss, padded)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("top_k", [0, 1])
def test_renormalised_a_support_of_less_than_two_ids_is_refused_by_its_key(top_k: int) -> None:
    """Trap 5: renormalised in one id, both sides are 1 and nothing is ever learned."""
    problem = random_problem()
    with pytest.raises(ValueError, match=rf"objective\.top_k = {top_k}: expected at least 2"):
        losses_of("support", problem, signal=problem.signal("support", top_k=top_k))


@pytest.mark.parametrize("tail", ["bucket", "sampled_corrected", "sampled_uncorrected", "none"])
def test_with_a_tail_one_id_is_a_support(tail: Tail) -> None:
    problem = random_problem()
    signal = problem.signal("support", top_k=1)
    naive_N = naive_support(problem, signal, tail=tail, terms=CASES["reverse"].terms)
    assert_agrees(losses_of("support", problem, signal=signal, tail=tail), naive_N, problem, tolerance=1e-12)


@pytest.mark.parametrize("tail", ["sampled_corrected", "sampled_uncorrected"])
def test_a_sampled_tail_without_the_teachers_log_probs_of_the_samples_is_refused(tail: Tail) -> None:
    problem = random_problem()
    signal = replace(problem.signal("support"), sampled_logprobs_N=torch.empty(0))
    with pytest.raises(ValueError, match=rf"objective\.tail = {tail}: the teacher sent 0 sampled log-probs for 11"):
        losses_of("support", problem, signal=signal, tail=tail)


@pytest.mark.parametrize("tail", TAILS)
def test_the_teachers_mass_on_the_support_is_a_statistic_where_it_is_known(tail: Tail) -> None:
    problem = random_problem(masked=(2,))
    signal = problem.signal("support")
    stats = losses_of("support", problem, signal=signal, tail=tail, chunk_tokens=4).stats
    mass_N = signal.logprobs_NK.exp().sum(-1) * problem.tokens.mask_N
    assert ("support_teacher_mass" in stats) == (tail != "renormalise")
    if tail != "renormalise":
        assert_close({"mass": stats["support_teacher_mass"]}, {"mass": mass_N}, 1e-12)


def test_renormalised_the_head_gradient_touches_only_the_rows_of_the_support() -> None:
    problem = random_problem()
    signal = problem.signal("support", top_k=2)
    losses = losses_of("support", problem, signal=signal)
    assert losses.sampled_logprobs_N.shape == (0,)
    touched = gradients(losses.loss, problem)[1].abs().sum(-1).nonzero().flatten()
    assert set(touched.tolist()) == set(signal.ids_NK.unique().tolist())


def test_the_payload_is_a_support_signal() -> None:
    assert OBJECTIVES["support"].payload(ObjectiveOptions()) == "support"


def test_ids_and_log_probs_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ids \(2, 3\), logprobs \(2, 2\)"):
        SupportSignal(
            ids_NK=torch.zeros(2, 3, dtype=torch.int64),
            logprobs_NK=torch.zeros(2, 2),
            sampled_logprobs_N=torch.zeros(2),
        )


@pytest.mark.parametrize("tail", TAILS)
def test_a_support_without_ids_is_refused_by_its_key(tail: Tail) -> None:
    problem = random_problem()
    whole = problem.signal("support")
    signal = replace(whole, ids_NK=whole.ids_NK[:, :0], logprobs_NK=whole.logprobs_NK[:, :0])
    with pytest.raises(ValueError, match=r"^objective\.top_k = 0: expected at least [12]; "):
        losses_of("support", problem, signal=signal, tail=tail)
