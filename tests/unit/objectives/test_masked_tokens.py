"""A masked token is not read: it may hold anything, and enters nothing."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import VARIANTS, Problem, assert_close, gradients, losses_of, random_problem

from opd_ray.objectives import (
    OBJECTIVES,
    HiddenSignal,
    ObjectiveOptions,
    SampledSignal,
    Signal,
    SupportSignal,
    keep_high_entropy,
)

MASKED = (0, 2, 6, 10)
NAN = float("nan")


def poisoned(problem: Problem, signal: Signal, *, id_: int) -> tuple[Problem, Signal]:
    """The same micro-batch with nonsense wherever a token is masked."""
    tokens, masked_N = problem.tokens, ~problem.tokens.mask_N
    bad = replace(
        problem,
        hidden_ND=problem.hidden_ND.detach().masked_fill(masked_N[:, None], NAN).requires_grad_(),
        tokens=replace(
            tokens,
            ids_N=tokens.ids_N.masked_fill(masked_N, id_),
            weights_N=tokens.weights_N.masked_fill(masked_N, NAN),
            sampler_logprobs_N=tokens.sampler_logprobs_N.masked_fill(masked_N, NAN),
            advantages_N=tokens.advantages_N.masked_fill(masked_N, NAN),
        ),
    )
    if isinstance(signal, SampledSignal):
        return bad, SampledSignal(logprobs_N=signal.logprobs_N.masked_fill(masked_N, NAN))
    if isinstance(signal, SupportSignal):
        return bad, SupportSignal(
            ids_NK=signal.ids_NK.masked_fill(masked_N[:, None], id_),
            logprobs_NK=signal.logprobs_NK.masked_fill(masked_N[:, None], NAN),
            sampled_logprobs_N=signal.sampled_logprobs_N.masked_fill(masked_N, NAN),
        )
    hidden_ND = signal.hidden_ND.masked_fill(masked_N[:, None], NAN)
    return bad, HiddenSignal(hidden_ND=hidden_ND, head_VD=signal.head_VD)


@pytest.mark.parametrize("id_", [-100, 3, 10_000])
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_masked_tokens_enter_nothing_whatever_they_hold(name: str, options: dict, id_: int) -> None:
    """Trap 9 among others: at discount 1 a masked cost would reach every token before it."""
    problem = random_problem(masked=MASKED)
    options = {**options, "chunk_tokens": 3, "diagnostic_tokens": 9}
    signal = problem.signal(OBJECTIVES[name].payload(ObjectiveOptions(**options)))
    bad_problem, bad_signal = poisoned(problem, signal, id_=id_)
    losses = losses_of(name, bad_problem, signal=bad_signal, **options)
    clean = losses_of(name, problem, signal=signal, **options)
    for field in ("loss_N", "divergence_N", "sampled_logprobs_N", "loss"):
        assert torch.equal(getattr(losses, field), getattr(clean, field))
    assert_close(losses.stats, clean.stats, 0)
    assert_close(losses.diagnostics, clean.diagnostics, 0)
    masked = list(MASKED)
    for tensor in (losses.loss_N, losses.divergence_N, *losses.stats.values()):
        assert tensor[masked].abs().max() == 0
    assert losses.sampled_logprobs_N[masked[: len(losses.sampled_logprobs_N)]].abs().sum() == 0
    for tensor in losses.diagnostics.values():
        assert tensor[masked[:-1]].abs().max() == 0
    assert losses.loss_N[problem.tokens.mask_N].abs().min() > 0
    gradient_ND, gradient_VD = gradients(losses.loss, bad_problem)
    assert gradient_ND[masked].abs().max() == 0
    clean_ND, clean_VD = gradients(clean.loss, problem)
    torch.testing.assert_close(gradient_ND, clean_ND, rtol=0, atol=0)
    torch.testing.assert_close(gradient_VD, clean_VD, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_other_tokens_are_as_if_the_masked_ones_were_not_there(name: str, options: dict) -> None:
    """Of sequences that end in masked tokens: removing these changes nothing."""
    problem = random_problem(masked=(2, 3, 9, 10))
    kept = [0, 1, 4, 5, 6, 7, 8]
    tokens = problem.tokens
    shorter = replace(
        problem,
        hidden_ND=problem.hidden_ND[kept],
        teacher_hidden_ND=problem.teacher_hidden_ND[kept],
        tokens=replace(
            tokens,
            ids_N=tokens.ids_N[kept],
            offsets=torch.tensor([0, 2, 3, 7]),
            mask_N=tokens.mask_N[kept],
            weights_N=tokens.weights_N[kept],
            sampler_logprobs_N=tokens.sampler_logprobs_N[kept],
            advantages_N=tokens.advantages_N[kept],
        ),
    )
    losses, expected = losses_of(name, problem, **options), losses_of(name, shorter, **options)
    torch.testing.assert_close(losses.loss_N[kept], expected.loss_N, rtol=0, atol=1e-12)
    pairs = zip(gradients(losses.loss, problem), gradients(expected.loss, problem), strict=True)
    for actual, gradient in pairs:
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-12)


def test_a_masked_token_is_exactly_zero_when_the_teacher_has_a_narrower_dtype() -> None:
    """Two uniform distributions over 12 ids, in float64 and in float32, are not equal to the last bit."""
    problem = random_problem(masked=MASKED)
    narrow = replace(
        problem,
        teacher_hidden_ND=problem.teacher_hidden_ND.float(),
        teacher_head_VD=problem.teacher_head_VD.float(),
    )
    losses = losses_of("full", narrow)
    assert losses.loss_N[list(MASKED)].abs().max() == 0
    assert losses.loss_N.dtype == torch.float64


def test_the_selection_by_entropy_reads_no_masked_token() -> None:
    problem = random_problem(masked=MASKED)
    bad, _ = poisoned(problem, problem.signal("sampled"), id_=-100)
    options = ObjectiveOptions(entropy_fraction=0.5, vocab_size=12, chunk_tokens=3)
    weights_N, bad_weights_N = (
        keep_high_entropy(each.hidden_ND, each.head_VD, tokens=each.tokens, options=options).weights_N
        for each in (problem, bad)
    )
    mask_N = problem.tokens.mask_N
    assert torch.equal(weights_N[mask_N], bad_weights_N[mask_N])
