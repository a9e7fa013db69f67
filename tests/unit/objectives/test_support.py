"""The support objective against its closed form, in float64."""

import pytest
import torch
from objective_oracles import random_problem

from opd_ray.objectives import OBJECTIVES, HiddenSignal, ObjectiveOptions, SupportSignal, TokenLosses, Tokens

NUM_TOKENS, VOCAB, TOP_K = 5, 7, 3
IDENTITY = torch.eye(VOCAB, dtype=torch.float64)
TOKENS = Tokens(
    ids_N=torch.arange(NUM_TOKENS),
    offsets=torch.tensor([0, 2, NUM_TOKENS]),
    mask_N=torch.ones(NUM_TOKENS, dtype=torch.bool),
)


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def support(logits_NV: torch.Tensor, *, signal: SupportSignal, **options: float) -> TokenLosses:
    """With the identity as head, the states are the logits."""
    return OBJECTIVES["support"].token_losses(
        logits_NV, IDENTITY, tokens=TOKENS, signal=signal, options=ObjectiveOptions(**options)
    )


def teacher_top(top_k: int) -> SupportSignal:
    top = random_logits(1).log_softmax(-1).topk(top_k, dim=-1)
    return SupportSignal(ids_NK=top.indices, logprobs_NK=top.values)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_logit_gradient_are_the_closed_form(temperature: float) -> None:
    logits, signal = random_logits(0).requires_grad_(), teacher_top(TOP_K)
    losses = support(logits, signal=signal, temperature=temperature)
    (gradient,) = torch.autograd.grad(losses.loss_N.sum(), logits)

    p = (logits.detach().gather(-1, signal.ids_NK) / temperature).softmax(-1)
    q = signal.logprobs_NK.exp() / signal.logprobs_NK.exp().sum(-1, keepdim=True)
    value = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(losses.loss_N, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.divergence_N, value, rtol=0, atol=1e-12)
    expected = torch.zeros_like(gradient).scatter(
        -1, signal.ids_NK, p * (p.log() - q.log() - value[:, None]) / temperature
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_gradients_in_states_and_head_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(NUM_TOKENS, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    options = ObjectiveOptions(chunk_tokens=2)

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return (
            OBJECTIVES["support"]
            .token_losses(hidden, head, tokens=TOKENS, signal=teacher_top(TOP_K), options=options)
            .loss_N
        )

    assert torch.autograd.gradcheck(loss, (hidden, head))


def test_logits_outside_the_support_change_nothing() -> None:
    signal = teacher_top(TOP_K)
    first = random_logits(0).requires_grad_()
    outside = torch.ones_like(first, dtype=torch.bool).scatter(-1, signal.ids_NK, False)
    second = (first.detach() + 50 * outside).requires_grad_()
    losses = [support(logits, signal=signal).loss_N for logits in (first, second)]
    gradients = [
        torch.autograd.grad(loss.sum(), logits)[0] for loss, logits in zip(losses, (first, second), strict=True)
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0][~outside].abs().min() > 0


def test_the_whole_vocabulary_as_support_gives_the_full_objective() -> None:
    logits = random_logits(0).requires_grad_()
    exact = OBJECTIVES["full"].token_losses(
        logits,
        IDENTITY,
        tokens=TOKENS,
        signal=HiddenSignal(hidden_ND=random_logits(1), head_VD=IDENTITY),
        options=ObjectiveOptions(),
    )
    whole = support(logits, signal=teacher_top(VOCAB))
    torch.testing.assert_close(whole.loss_N, exact.loss_N, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(losses.loss_N.sum(), logits)[0] for losses in (whole, exact)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_a_teacher_known_up_to_a_constant_per_token_suffices() -> None:
    signal = teacher_top(TOP_K)
    shifted = SupportSignal(
        ids_NK=signal.ids_NK, logprobs_NK=signal.logprobs_NK + torch.arange(float(NUM_TOKENS))[:, None]
    )
    losses = [support(random_logits(0), signal=each).loss_N for each in (signal, shifted)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("absent_id", [-1, VOCAB - 1, VOCAB, 10_000])
def test_ids_outside_the_common_vocabulary_are_not_in_the_support(absent_id: int) -> None:
    """Trap 8: a teacher's padded row may be in its top-K; here the common vocabulary is one id shorter."""
    top = random_logits(1)[:, : VOCAB - 1].topk(TOP_K, dim=-1)
    signal = SupportSignal(ids_NK=top.indices, logprobs_NK=top.values)
    padded = SupportSignal(
        ids_NK=torch.cat([signal.ids_NK, torch.full((NUM_TOKENS, 1), absent_id)], dim=1),
        logprobs_NK=torch.cat([signal.logprobs_NK, torch.full((NUM_TOKENS, 1), 5.0, dtype=torch.float64)], dim=1),
    )
    logits = random_logits(0).requires_grad_()
    losses = [support(logits, signal=each, vocab_size=VOCAB - 1).loss_N for each in (signal, padded)]
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [0, 1])
def test_a_support_of_less_than_two_ids_is_refused_by_its_key(top_k: int) -> None:
    """Trap 5: renormalised in one id, both sides are 1 and nothing is ever learned."""
    with pytest.raises(ValueError, match=rf"objective\.top_k = {top_k}: expected at least 2"):
        support(random_logits(0), signal=teacher_top(top_k))


@pytest.mark.parametrize("diagnostic_tokens", [0, 3, 100])
def test_the_first_tokens_get_a_full_vocabulary_log_prob(diagnostic_tokens: int) -> None:
    logits = random_logits(0)
    losses = support(logits, signal=teacher_top(TOP_K), diagnostic_tokens=diagnostic_tokens, temperature=0.7)
    expected = (logits / 0.7).log_softmax(-1)[torch.arange(NUM_TOKENS), TOKENS.ids_N][:diagnostic_tokens]
    torch.testing.assert_close(losses.sampled_logprobs_N, expected)
    assert not losses.sampled_logprobs_N.requires_grad


def test_the_head_gradient_touches_only_the_rows_of_the_support() -> None:
    problem = random_problem()
    signal = problem.signal("support", top_k=2)
    losses = OBJECTIVES["support"].token_losses(
        problem.hidden_ND, problem.head_VD, tokens=problem.tokens, signal=signal, options=ObjectiveOptions()
    )
    (gradient,) = torch.autograd.grad(losses.loss_N.sum(), problem.head_VD)
    touched = set(gradient.abs().sum(-1).nonzero().flatten().tolist())
    assert touched == set(signal.ids_NK.unique().tolist())
