"""The cut of a batch into micro-batches, and micro-batches with nothing to learn from, for every objective."""

import itertools
from dataclasses import replace

import pytest
import torch
from objective_oracles import VARIANTS, Problem, assert_close, gradients, losses_of, part_of, random_problem
from torch import Tensor

LENGTHS = (4, 1, 6, 3, 1, 2, 7, 5)
MASKED = (0, 2, 6, 10, 12, 13)


def with_weights(problem: Problem, weights_N: Tensor) -> Problem:
    return replace(problem, tokens=replace(problem.tokens, weights_N=weights_N))


def results(name: str, parts: list[Problem], whole: Problem, options: dict) -> dict[str, Tensor]:
    """The summed loss of micro-batches, its gradients added up one by one, and the losses of all tokens."""
    losses = [losses_of(name, part, **options) for part in parts]
    pairs = [gradients(each.loss, whole) for each in losses]
    return {
        "loss": torch.stack([each.loss.detach() for each in losses]).sum(),
        "loss_N": torch.cat([each.loss_N for each in losses]),
        "hidden": torch.stack([pair[0] for pair in pairs]).sum(0),
        "head": torch.stack([pair[1] for pair in pairs]).sum(0),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_token_mean_does_not_depend_on_the_cut_into_micro_batches(
    name: str, options: dict, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Trap 7: every token is weighted by 1 / (number of kept tokens of the whole batch)."""
    problem = random_problem(dtype=dtype, masked=MASKED, lengths=LENGTHS)
    num_tokens = len(problem.tokens.ids_N)
    problem = with_weights(problem, torch.full((num_tokens,), 1 / (num_tokens - len(MASKED)), dtype=dtype))
    parts = [part_of(problem, first, min(first + size, 8)) for first in range(0, 8, size)]
    whole = results(name, [problem], problem, options)
    torch.testing.assert_close(whole["loss"], whole["loss_N"].sum() / (num_tokens - len(MASKED)))
    assert_close(results(name, parts, problem, options), whole, tolerance)


def test_a_mean_per_micro_batch_would_depend_on_the_cut() -> None:
    """Trap 7, what goes wrong: with micro-batches of one sequence it is a mean over sequences."""
    problem = random_problem(masked=MASKED, lengths=LENGTHS)
    loss_N, mask_N = losses_of("full", problem).loss_N, problem.tokens.mask_N
    means = []
    for size in (1, 8):
        bounds = problem.tokens.offsets[::size].tolist()
        cut = itertools.pairwise(bounds)
        means.append(torch.stack([loss_N[a:b].sum() / mask_N[a:b].sum().clamp(min=1) for a, b in cut]).mean())
    assert (means[0] - means[1]).abs() > 0.01


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_loss_is_the_weighted_sum_and_a_weight_of_zero_removes_a_gradient(name: str, options: dict) -> None:
    problem = random_problem(masked=(2,))
    weights_N = torch.linspace(0, 2, 11)
    losses = losses_of(name, with_weights(problem, weights_N), **options)
    torch.testing.assert_close(losses.loss.detach(), (weights_N * losses.loss_N).sum(), rtol=0, atol=1e-12)
    plain = losses_of(name, problem, **options)
    assert torch.equal(losses.loss_N, plain.loss_N)
    hidden_gradient, _ = gradients(losses.loss, problem)
    assert torch.equal(hidden_gradient[0], torch.zeros(5, dtype=torch.float64))
    none = losses_of(name, with_weights(problem, torch.zeros(11)), **options)
    for tensor in (none.loss, *gradients(none.loss, problem)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_a_micro_batch_without_a_counted_token_gives_zero_gradients(name: str, options: dict) -> None:
    problem = random_problem(masked=range(11))
    losses = losses_of(name, problem, diagnostic_tokens=3, **options)
    per_token = (losses.loss_N, losses.divergence_N, *losses.stats.values(), *losses.diagnostics.values())
    for tensor in (losses.loss, *per_token, *gradients(losses.loss, problem)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_an_empty_micro_batch_gives_zero_gradients(name: str, options: dict) -> None:
    problem = random_problem()
    losses = losses_of(name, part_of(problem, 0, 0), diagnostic_tokens=3, **options)
    per_token = (losses.loss_N, losses.divergence_N, *losses.stats.values(), *losses.diagnostics.values())
    assert all(tensor.shape == (0,) for tensor in per_token)
    assert losses.loss == 0
    for gradient in gradients(losses.loss, problem):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_sequences_without_tokens_change_nothing(name: str, options: dict) -> None:
    problem = random_problem()
    expected = losses_of(name, problem, **options).loss_N
    offsets = torch.tensor([0, 0, 4, 4, 5, 11, 11, 11])
    padded = replace(problem, tokens=replace(problem.tokens, offsets=offsets))
    assert torch.equal(
        losses_of(name, padded, chunk_tokens=4, **options).loss_N.round(decimals=12), expected.round(decimals=12)
    )
