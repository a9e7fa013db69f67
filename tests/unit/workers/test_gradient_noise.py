"""The noise of micro-batches' gradients against its definition."""

import pytest
import torch

from workers.learner.noise import GradientSquares, gradient_noise


def test_hooks_see_each_micro_batchs_own_gradient_a_tied_weight_once():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(5, 3)
    head = torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    module = torch.nn.ModuleList([embedding, head])
    squares, expected = GradientSquares(module), 0.0
    for ids in ([0, 1], [2], [3, 4, 0]):
        loss = head(embedding(torch.tensor(ids))).square().sum()
        (own,) = torch.autograd.grad(loss, [embedding.weight], retain_graph=True)
        squares.take()  # that pass went through the hooks as well
        loss.backward()
        assert squares.take() == pytest.approx(float(own.square().sum()), rel=1e-6)
        expected += float(own.square().sum())
    assert squares.take() == 0
    assert float(embedding.weight.grad.square().sum()) != pytest.approx(expected)  # of the sum, not the sum of squares


def test_the_noise_is_the_trace_of_the_covariance_over_the_square_of_the_mean():
    generator = torch.Generator().manual_seed(1)
    estimates = torch.randn(7, 50, generator=generator, dtype=torch.float64) + 0.5
    mean, parts = estimates.mean(dim=0), estimates / len(estimates)
    found = gradient_noise(squares=float(parts.square().sum()), num_micro_batches=7, norm=float(mean.norm()))
    assert found == pytest.approx(float(estimates.var(dim=0).sum() / mean.square().sum()), rel=1e-9)


def test_equal_gradients_have_none_and_one_alone_has_no_answer():
    assert gradient_noise(squares=4 * (0.25**2), num_micro_batches=4, norm=1.0) == pytest.approx(0, abs=1e-12)
    assert gradient_noise(squares=1.0, num_micro_batches=1, norm=1.0) is None
    assert gradient_noise(squares=1.0, num_micro_batches=3, norm=0.0) is None
