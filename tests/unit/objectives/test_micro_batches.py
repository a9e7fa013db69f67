"""Masked tokens, empty micro-batches and the cut into micro-batches, for every objective."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import Problem, losses_of, random_problem, weighted_gradients

from opd_ray.objectives import OBJECTIVES, HiddenSignal, ObjectiveOptions, SampledSignal, SupportSignal, Tokens

NAMES = sorted(OBJECTIVES)
MASKED = (0, 2, 6, 10)


def part_of(problem: Problem, rows: slice, *, offsets: list[int]) -> Problem:
    """The micro-batch of some of the tokens."""
    return replace(
        problem,
        hidden_ND=problem.hidden_ND[rows],
        teacher_hidden_ND=problem.teacher_hidden_ND[rows],
        tokens=Tokens(
            ids_N=problem.tokens.ids_N[rows], offsets=torch.tensor(offsets), mask_N=problem.tokens.mask_N[rows]
        ),
    )


def poisoned(problem: Problem, signal: SampledSignal | SupportSignal | HiddenSignal) -> tuple[Problem, object]:
    """The same micro-batch with nonsense wherever a token is masked."""
    masked_N = ~problem.tokens.mask_N
    nan = float("nan")
    bad = replace(
        problem,
        hidden_ND=problem.hidden_ND.detach().masked_fill(masked_N[:, None], nan).requires_grad_(),
        tokens=replace(problem.tokens, ids_N=problem.tokens.ids_N.masked_fill(masked_N, -100)),
    )
    if isinstance(signal, SampledSignal):
        return bad, SampledSignal(logprobs_N=signal.logprobs_N.masked_fill(masked_N, nan))
    if isinstance(signal, SupportSignal):
        ids_NK = signal.ids_NK.masked_fill(masked_N[:, None], 10_000)
        return bad, SupportSignal(ids_NK=ids_NK, logprobs_NK=signal.logprobs_NK.masked_fill(masked_N[:, None], nan))
    hidden = signal.hidden_ND.masked_fill(masked_N[:, None], nan)
    return bad, HiddenSignal(hidden_ND=hidden, head_VD=signal.head_VD)


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_enter_nothing_whatever_they_hold(name: str) -> None:
    """Trap 9 among others: at discount 1 a masked cost would reach every token before it."""
    problem = random_problem(masked=MASKED)
    clean = losses_of(name, problem, discount=1.0, chunk_tokens=3)
    bad_problem, bad_signal = poisoned(problem, problem.signal(name))
    losses = OBJECTIVES[name].token_losses(
        bad_problem.hidden_ND,
        bad_problem.head_VD,
        tokens=bad_problem.tokens,
        signal=bad_signal,
        options=ObjectiveOptions(vocab_size=problem.vocab_size, discount=1.0, chunk_tokens=3),
    )
    masked = list(MASKED)
    for field in (losses.loss_N, losses.divergence_N, losses.sampled_logprobs_N):
        assert torch.equal(field[masked], torch.zeros(len(masked)))
    assert torch.equal(losses.loss_N, clean.loss_N)
    assert losses.loss_N[problem.tokens.mask_N].abs().min() > 0
    hidden_gradient, head_gradient = weighted_gradients(losses.loss_N, bad_problem)
    clean_hidden_gradient, clean_head_gradient = weighted_gradients(clean.loss_N, problem)
    assert torch.equal(hidden_gradient[masked], torch.zeros(len(masked), 5))
    torch.testing.assert_close(hidden_gradient, clean_hidden_gradient)
    torch.testing.assert_close(head_gradient, clean_head_gradient)


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_a_counted_token_gives_zero_gradients(name: str) -> None:
    problem = random_problem(masked=tuple(range(11)))
    losses = losses_of(name, problem, discount=1.0)
    for gradient in weighted_gradients(losses.loss_N, problem):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_micro_batch_gives_zero_gradients(name: str) -> None:
    problem = random_problem()
    empty = part_of(problem, slice(0), offsets=[0])
    losses = losses_of(name, empty)
    assert losses.loss_N.shape == (0,)
    (gradient,) = torch.autograd.grad(losses.loss_N.sum(), problem.head_VD)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_the_summed_loss_does_not_depend_on_the_cut_into_micro_batches(name: str) -> None:
    """Trap 7: the learner divides by the global count, so the sums over any cut between sequences must agree."""
    problem = random_problem(dtype=torch.float64, masked=MASKED)
    whole = losses_of(name, problem, discount=1.0).loss_N.sum()
    parts = torch.zeros((), dtype=torch.float64)
    for start, end in ((0, 4), (4, 5), (5, 11)):
        part = part_of(problem, slice(start, end), offsets=[0, end - start])
        parts = parts + losses_of(name, part, discount=1.0).loss_N.sum()
    torch.testing.assert_close(parts, whole)
    leaves = problem.hidden_ND, problem.head_VD
    pairs = zip(torch.autograd.grad(parts, leaves), torch.autograd.grad(whole, leaves), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


def test_a_masked_token_is_exactly_zero_when_the_teacher_has_a_narrower_dtype() -> None:
    """Two uniform distributions over 12 ids, in float64 and in float32, are not equal to the last bit."""
    problem = random_problem(dtype=torch.float64, masked=MASKED)
    narrow = replace(
        problem,
        teacher_hidden_ND=problem.teacher_hidden_ND.float(),
        teacher_head_VD=problem.teacher_head_VD.float(),
    )
    losses = losses_of("full", narrow)
    assert torch.equal(losses.loss_N[list(MASKED)], torch.zeros(len(MASKED), dtype=torch.float64))
