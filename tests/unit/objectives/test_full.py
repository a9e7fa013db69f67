"""The full objective against its closed form and finite differences, in float64."""

import pytest
import torch
from objective_oracles import random_problem

from opd_ray.objectives import OBJECTIVES, HiddenSignal, ObjectiveOptions, TokenLosses, Tokens


def full(hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, signal: HiddenSignal, **options: float) -> TokenLosses:
    num_tokens = len(hidden_ND)
    tokens = Tokens(
        ids_N=torch.arange(num_tokens) % 3,
        offsets=torch.tensor([0, num_tokens]),
        mask_N=torch.ones(num_tokens, dtype=torch.bool),
    )
    return OBJECTIVES["full"].token_losses(
        hidden_ND, head_VD, tokens=tokens, signal=signal, options=ObjectiveOptions(**options)
    )


def random_signal(*, num_rows: int = 6, num_tokens: int = 5, seed: int = 1) -> HiddenSignal:
    generator = torch.Generator().manual_seed(seed)
    return HiddenSignal(
        hidden_ND=torch.randn(num_tokens, 3, generator=generator, dtype=torch.float64),
        head_VD=torch.randn(num_rows, 3, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_logit_gradient_are_the_closed_form(temperature: float) -> None:
    signal = random_signal()
    logits_NV = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    losses = full(logits_NV, torch.eye(6, dtype=torch.float64), signal=signal, temperature=temperature)
    (gradient,) = torch.autograd.grad(losses.loss_N.sum(), logits_NV)

    log_p = (logits_NV.detach() / temperature).log_softmax(-1)
    log_q = (signal.hidden_ND @ signal.head_VD.T / temperature).log_softmax(-1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(losses.loss_N, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.divergence_N, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.sampled_logprobs_N, log_p[torch.arange(5), torch.arange(5) % 3])
    expected = log_p.exp() * (log_p - log_q - value[:, None]) / temperature
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_gradients_in_states_and_head_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    signal = random_signal()
    assert torch.autograd.gradcheck(
        lambda hidden, head: full(hidden, head, signal=signal, chunk_tokens=2).loss_N, (hidden, head)
    )


@pytest.mark.parametrize("poisoned", ["student", "teacher"])
def test_rows_beyond_the_common_vocabulary_change_nothing(poisoned: str) -> None:
    """Trap 8: heads are padded to different sizes; the padding must not enter either softmax."""
    problem = random_problem(dtype=torch.float64)
    results = []
    for scale in (1.0, 100.0):
        head, teacher_head = problem.head_VD.detach().clone(), problem.teacher_head_VD.clone()
        {"student": head, "teacher": teacher_head}[poisoned][problem.vocab_size :] *= scale
        signal = HiddenSignal(hidden_ND=problem.teacher_hidden_ND, head_VD=teacher_head)
        losses = full(problem.hidden_ND, head.requires_grad_(), signal=signal, vocab_size=problem.vocab_size)
        hidden_gradient, head_gradient = torch.autograd.grad(losses.loss_N.sum(), (problem.hidden_ND, head))
        assert torch.equal(head_gradient[problem.vocab_size :], torch.zeros(1, 5, dtype=torch.float64))
        results.append((losses.loss_N, losses.sampled_logprobs_N, hidden_gradient))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_without_a_vocabulary_size_the_smaller_head_sets_the_range() -> None:
    problem = random_problem(dtype=torch.float64)
    signal = HiddenSignal(hidden_ND=problem.teacher_hidden_ND, head_VD=problem.teacher_head_VD)
    default = full(problem.hidden_ND, problem.head_VD, signal=signal)
    explicit = full(problem.hidden_ND, problem.head_VD, signal=signal, vocab_size=13)
    assert torch.equal(default.loss_N, explicit.loss_N)


def test_a_vocabulary_beyond_a_head_is_refused() -> None:
    problem = random_problem()
    signal = HiddenSignal(hidden_ND=problem.teacher_hidden_ND, head_VD=problem.teacher_head_VD)
    with pytest.raises(ValueError, match="vocab_size = 14: expected at most 13"):
        full(problem.hidden_ND, problem.head_VD, signal=signal, vocab_size=14)
