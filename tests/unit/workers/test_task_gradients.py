"""The norm of each task's gradient from its projection, against the gradient itself."""

import numpy as np
import pytest
import torch

from workers.learner.task_gradients import WIDTH, TaskGradients, norms, projected


def test_a_gradient_no_wider_than_the_projection_keeps_its_norm():
    gradient = torch.randn(60, 61, generator=torch.Generator().manual_seed(0))
    assert gradient.numel() < WIDTH
    assert float(projected(gradient, seed=3).norm()) == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_projections_add_up_like_the_gradients_over_many_blocks():
    one, other = torch.randn(2, 700, 3000, generator=torch.Generator().manual_seed(0))
    whole = projected(one + other, seed=1)
    torch.testing.assert_close(projected(one, seed=1) + projected(other, seed=1), whole, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(projected(one + other, seed=2), whole)


def test_the_square_of_the_norm_is_unbiased_and_as_exact_as_it_says():
    gradient = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0))
    gradient[:, 5] *= 10  # one column has a good part of it
    exact = float(gradient.double().square().sum())
    found = np.array([float(projected(gradient, seed=seed).double().square().sum()) / exact for seed in range(60)])
    assert found.mean() == pytest.approx(1, abs=0.01)
    assert found.std() < 1.5 * (2 / WIDTH) ** 0.5


def test_each_tasks_gradient_is_that_of_its_own_micro_batches_on_all_ranks():
    module = torch.nn.Linear(30, 20, bias=False)
    inputs = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    watched, ranks, exact = TaskGradients(module), [], dict.fromkeys("ab", torch.zeros(20, 30))
    for of_rank in ([("a", 0), ("b", 1), ("", 2)], [("a", 3), ("a", 1)]):
        for task, row in of_rank:
            module.zero_grad()
            watched.begin(task)
            module(inputs[row]).square().sum().backward()
            if task:
                exact[task] = exact[task] + module.weight.grad / 2  # the mean over ranks
        ranks.append(watched.take())
    assert watched.take() == {}
    expected = {task: pytest.approx(float(gradient.norm()), rel=1e-5) for task, gradient in exact.items()}
    assert norms(ranks) == expected
