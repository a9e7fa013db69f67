"""What a support leaves out: order, expectations over the sampled token, and what the uncorrected tails get wrong.

Suffixes: N flat tokens, V vocabulary, K support.
"""

from dataclasses import replace

import pytest
import torch
from objective_oracles import CASES, Case, Problem, losses_of, random_problem
from torch import Tensor

from opd_ray.objectives import HiddenSignal, SupportSignal, Tail, Tokens, forward_kl, reverse_kl

VOCAB = 12


def bucket_losses(problem: Problem, case: Case, top_k: int) -> Tensor:
    signal = problem.signal("support", top_k=top_k)
    return losses_of("support", problem, signal=signal, tail="bucket", divergence=case.divergence).loss_N


def tails(p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Return the mass from the teacher's k-th likeliest token on, [K,N] for all k."""
    sorted_NV = p_NV.gather(1, log_q_NV.argsort(-1, descending=True))
    return sorted_NV.flip(-1).cumsum(-1).flip(-1).T


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bucket_never_adds_and_larger_supports_see_more(case: Case) -> None:
    """Data processing: merging outcomes cannot raise a divergence."""
    problem = random_problem()
    losses_KN = torch.stack([bucket_losses(problem, case, top_k) for top_k in range(1, VOCAB + 1)])
    full_N = losses_of("full", problem, divergence=case.divergence).loss_N
    # A tail of mass q is known to the rounding of 1, so its log to that over q, and a loss to p times as much.
    p_KN, q_KN = (tails(log_NV.exp(), problem.log_q()) for log_NV in (problem.log_p().detach(), problem.log_q()))
    rounding_N = 4 * torch.finfo(torch.float64).eps * (1 + (p_KN / q_KN).amax(dim=0))
    assert (losses_KN.diff(dim=0) >= -rounding_N).all()
    assert (losses_KN[0] >= 0).all()
    assert (losses_KN[:4] < full_N).all()
    assert losses_KN[3].mean() < 0.99 * full_N.mean()
    torch.testing.assert_close(losses_KN[-1], full_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", [reverse_kl(), forward_kl()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bucket_of_nothing_is_the_full_divergence_in_value_and_gradient(
    dtype: torch.dtype, divergence: object
) -> None:
    problem = random_problem(dtype=dtype)
    signal = problem.signal("support", top_k=VOCAB)
    bucket = losses_of("support", problem, signal=signal, tail="bucket", divergence=divergence)
    full = losses_of("full", problem, divergence=divergence)
    torch.testing.assert_close(bucket.loss_N, full.loss_N)
    torch.testing.assert_close(bucket.sampled_logprobs_N, full.sampled_logprobs_N)
    for actual, expected in zip(*(torch.autograd.grad(x.loss, problem.leaves()) for x in (bucket, full)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_teacher_without_mass_outside_the_support_gives_a_finite_bucket() -> None:
    problem = random_problem(dtype=torch.float32)
    signal = problem.signal("support", top_k=3)
    certain = replace(signal, logprobs_NK=signal.logprobs_NK.log_softmax(-1))
    losses = losses_of("support", problem, signal=certain, tail="bucket")
    assert losses.loss_N.isfinite().all()
    assert losses.loss_N.min() > 0
    assert all(x.isfinite().all() for x in torch.autograd.grad(losses.loss, problem.leaves()))


def one_prefix(top_k: int) -> tuple[Problem, SupportSignal]:
    """Every token that could follow one prefix, weighted by its probability: a loss is an expectation over y."""
    problem = random_problem()
    row = 3
    probability_V = problem.log_p()[row].exp().detach()
    logits_V = problem.hidden_ND.detach()[row].expand(VOCAB, -1).clone().requires_grad_()
    tokens = Tokens(
        ids_N=torch.arange(VOCAB),
        offsets=torch.arange(VOCAB + 1),
        mask_N=torch.ones(VOCAB, dtype=torch.bool),
        weights_N=probability_V,
        sampler_logprobs_N=probability_V.log(),
        advantages_N=torch.zeros(VOCAB),
    )
    teacher = problem.teacher_hidden_ND[row].expand(VOCAB, -1)
    problem = replace(problem, hidden_ND=logits_V, teacher_hidden_ND=teacher, tokens=tokens)
    return problem, problem.signal("support", top_k=top_k)


def gradient_of(loss: Tensor, problem: Problem) -> Tensor:
    """In the one prefix's state and the head, as one vector."""
    hidden_gradient, head_gradient = torch.autograd.grad(loss, problem.leaves())
    return torch.cat([hidden_gradient.sum(0), head_gradient.flatten()])


def support_mass_gradient(problem: Problem, signal: SupportSignal) -> Tensor:
    mass_N = problem.log_p().exp().gather(-1, signal.ids_NK).sum(-1)
    return gradient_of((problem.tokens.weights_N * mass_N).sum(), problem)


@pytest.mark.parametrize("top_k", [1, 4, 11, 12])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_over_the_sampled_token_the_corrected_tail_is_the_full_divergence(case: Case, top_k: int) -> None:
    problem, signal = one_prefix(top_k)
    options = {"divergence": case.divergence}
    seen = losses_of("support", problem, signal=signal, tail="sampled_corrected", **options)
    full = losses_of("full", problem, **options)
    torch.testing.assert_close(seen.loss, full.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_of(seen.loss, problem), gradient_of(full.loss, problem), rtol=0, atol=1e-12)


def test_with_the_log_ratio_held_constant_the_value_is_unbiased_and_the_gradient_is_not() -> None:
    """Trap 4: the gradient is that of the KL plus that of the student's mass on S."""
    problem, signal = one_prefix(4)
    seen = losses_of("support", problem, signal=signal, tail="sampled_uncorrected")
    full = losses_of("full", problem)
    torch.testing.assert_close(seen.loss, full.loss, rtol=0, atol=1e-12)
    bias = support_mass_gradient(problem, signal)
    assert bias.norm() > 0.05
    gradient = gradient_of(full.loss, problem) + bias
    torch.testing.assert_close(gradient_of(seen.loss, problem), gradient, rtol=0, atol=1e-12)


def test_the_raw_head_of_the_reverse_kl_pushes_mass_out_of_the_support() -> None:
    """Trap 3: at p == q on S, where the KL is at rest, what is left is the gradient of P_S."""
    problem, signal = one_prefix(4)
    log_p_NK = problem.log_p().detach().gather(-1, signal.ids_NK)
    agreeing = replace(signal, logprobs_NK=log_p_NK)
    losses = losses_of("support", problem, signal=agreeing, tail="none")
    expected = support_mass_gradient(problem, agreeing)
    assert expected.norm() > 0.05
    torch.testing.assert_close(gradient_of(losses.loss, problem), expected, rtol=0, atol=1e-12)
    bucket = losses_of("support", problem, signal=agreeing, tail="bucket")
    assert gradient_of(bucket.loss, problem).norm() < 1e-13


def test_the_raw_head_can_be_negative_and_nothing_clamps_it() -> None:
    """Trap 6: a clamp at 0 would take the gradient with it."""
    problem, signal = one_prefix(4)
    generous = replace(signal, logprobs_NK=problem.log_p().detach().gather(-1, signal.ids_NK) + 0.3)
    losses = losses_of("support", problem, signal=generous, tail="none")
    assert losses.loss_N.max() < -0.05
    assert gradient_of(losses.loss, problem).norm() > 0.05


def descend(tail: Tail, *, num_steps: int = 120) -> tuple[float, float]:
    """Descend from near the teacher, and return the student's mass on S and its entropy in the end."""
    vocab_size, top_k = 40, 4
    log_q_V = (
        torch.cat([torch.tensor([3.0, 2.5, 2.0, 1.5]), -2 * torch.ones(vocab_size - top_k)]).double().log_softmax(0)
    )
    noise_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_NV = (log_q_V + 0.3 * noise_V)[None].clone().requires_grad_()
    eye = torch.eye(vocab_size, dtype=torch.float64)
    tokens = Tokens(
        ids_N=torch.zeros(1, dtype=torch.int64),
        offsets=torch.tensor([0, 1]),
        mask_N=torch.ones(1, dtype=torch.bool),
        weights_N=torch.ones(1),
        sampler_logprobs_N=torch.zeros(1),
        advantages_N=torch.zeros(1),
    )
    problem = Problem(
        hidden_ND=logits_NV,
        head_VD=eye,
        teacher_hidden_ND=log_q_V[None],
        teacher_head_VD=eye,
        tokens=tokens,
        vocab_size=vocab_size,
    )
    for _ in range(num_steps):
        loss = losses_of("support", problem, signal=problem.signal("support", top_k=top_k), tail=tail).loss
        with torch.no_grad():
            logits_NV -= 2 * torch.autograd.grad(loss, logits_NV)[0]
    log_p_V = logits_NV.detach()[0].log_softmax(0)
    return float(log_p_V[:top_k].exp().sum()), float(-(log_p_V.exp() * log_p_V).sum())


def test_descending_the_raw_head_empties_the_support_and_the_other_tails_do_not() -> None:
    """Trap 3: the teacher has 0.9 on S, the student 0.87; the raw head is at rest at 0.9 / e only."""
    mass, entropy = descend("none", num_steps=0)
    assert 0.86 < mass < 0.88
    assert entropy < 2.1
    mass, entropy = descend("none")
    assert 0.32 < mass < 0.34
    assert entropy > 3
    for tail in ("renormalise", "bucket"):
        mass, entropy = descend(tail)
        assert mass > 0.87
        assert entropy < 2


def test_full_and_renormalised_gradients_differ_where_only_the_tail_is_wrong() -> None:
    """Renormalised, the support says nothing about the mass outside it; the bucket does."""
    problem, signal = one_prefix(4)
    agreeing = replace(signal, logprobs_NK=problem.log_p().detach().gather(-1, signal.ids_NK) - 0.5)
    renormalised = losses_of("support", problem, signal=agreeing)
    assert gradient_of(renormalised.loss, problem).norm() < 1e-14
    bucket = losses_of("support", problem, signal=agreeing, tail="bucket")
    assert gradient_of(bucket.loss, problem).norm() > 0.05
    assert bucket.loss > 0.01


def test_an_equal_teacher_has_no_expected_gradient_under_the_corrected_tail() -> None:
    problem, _ = one_prefix(4)
    equal = HiddenSignal(hidden_ND=problem.hidden_ND.detach(), head_VD=problem.head_VD.detach())
    same = replace(problem, teacher_hidden_ND=equal.hidden_ND, teacher_head_VD=equal.head_VD)
    losses = losses_of("support", problem, signal=same.signal("support"), tail="sampled_corrected")
    assert losses.loss.detach().abs() < 1e-14
    assert gradient_of(losses.loss, problem).norm() < 1e-14


def without_support_in_some_rows() -> tuple[Problem, SupportSignal]:
    """As where the only id that the teacher names is one that is removed from supports; y is 0 in one row."""
    problem = random_problem()
    signal = problem.signal("support")
    ids_N, ids_NK = problem.tokens.ids_N.clone(), signal.ids_NK.clone()
    ids_N[4], ids_N[7], ids_NK[[4, 7]] = 0, 5, -1
    return replace(problem, tokens=replace(problem.tokens, ids_N=ids_N)), replace(signal, ids_NK=ids_NK)


@pytest.mark.parametrize("tail", ["bucket", "sampled_corrected", "sampled_uncorrected", "none"])
def test_a_row_without_any_id_in_its_support_is_all_tail(tail: Tail) -> None:
    problem, signal = without_support_in_some_rows()
    losses = losses_of("support", problem, signal=signal, tail=tail)
    log_p_N = problem.sampled(problem.log_p())
    torch.testing.assert_close(losses.sampled_logprobs_N, log_p_N.detach())
    log_ratio_N = log_p_N.detach() - signal.sampled_logprobs_N
    cost_N = {
        "sampled_corrected": log_ratio_N + log_p_N - log_p_N.detach() + log_ratio_N * (log_p_N - log_p_N.detach()),
        "sampled_uncorrected": log_ratio_N * (1 + log_p_N - log_p_N.detach()),
    }.get(tail, 0 * log_p_N)
    torch.testing.assert_close(losses.loss_N[[4, 7]], cost_N[[4, 7]].detach())
    (hidden_gradient,) = torch.autograd.grad(losses.loss, problem.hidden_ND)
    (expected,) = torch.autograd.grad((problem.tokens.weights_N * cost_N).sum(), problem.hidden_ND)
    torch.testing.assert_close(hidden_gradient[[4, 7]], expected[[4, 7]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_renormalised_a_row_without_any_id_in_its_support_has_no_loss_and_no_gradient(case: Case) -> None:
    problem, signal = without_support_in_some_rows()
    losses = losses_of("support", problem, signal=signal, divergence=case.divergence)
    assert losses.loss_N[[4, 7]].abs().max() < 1e-15
    hidden_gradient, _ = torch.autograd.grad(losses.loss, problem.leaves())
    assert hidden_gradient[[4, 7]].abs().max() == 0
