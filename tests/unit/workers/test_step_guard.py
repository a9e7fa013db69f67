"""Which steps an engine takes."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.learner.guard import StepGuard


class Engine:
    """At ZeRO-0 in float32, as DeepSpeed's: one weight, and torch's optimizer on a gradient that is given."""

    def __init__(self, limit: float = 1.0) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.module = torch.nn.ParameterList([self.weight])
        self.optimizer: Any = torch.optim.SGD([self.weight], lr=1.0)
        self.limit = limit
        self.gradient = 0.0

    def gradient_clipping(self) -> float:
        return self.limit

    def step(self) -> None:
        self.weight.grad = torch.tensor([self.gradient])
        if self.limit > 0:
            self.clip_fp32_gradients()
        self.optimizer.step()


def norms_taken(guard: StepGuard, engine: Engine, *gradients: float) -> list[bool]:
    taken = []
    for gradient in gradients:
        engine.gradient = gradient
        guard.step()
        taken.append(not guard.left_out)
    return taken


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_spike_is_left_out_with_its_norm_once_there_is_something_to_compare_with(limit: float):
    engine = Engine(limit)
    guard = StepGuard(engine, spike_factor=3.0)
    assert norms_taken(guard, engine, 100.0, *[2.0] * 7) == [True] * 8
    before = engine.weight.clone()
    assert norms_taken(guard, engine, 6.5) == [False]
    assert (guard.norm, guard.spiked) == (6.5, True)
    assert torch.equal(engine.weight, before)
    assert norms_taken(guard, engine, 5.5) == [True]
    assert (guard.norm, guard.spiked) == (5.5, False)
    assert not torch.equal(engine.weight, before)


def test_a_spike_does_not_become_what_is_usual():
    engine = Engine()
    guard = StepGuard(engine, spike_factor=2.0)
    assert norms_taken(guard, engine, *[1.0] * 8, *[9.0] * 40) == [True] * 8 + [False] * 40


def test_without_a_factor_everything_finite_is_taken():
    engine = Engine()
    guard = StepGuard(engine, spike_factor=0.0)
    assert norms_taken(guard, engine, *[1.0] * 9, 1e6, math.nan, math.inf, 1.0) == [True] * 10 + [False, False, True]
    norms_taken(guard, engine, math.nan)
    assert (guard.norm, guard.spiked) == (math.inf, False)


def test_a_restored_guard_compares_with_what_was_before():
    engine = Engine()
    guard = StepGuard(engine, spike_factor=3.0)
    norms_taken(guard, engine, *[1.0] * 8)
    other = Engine()
    restored = StepGuard(other, spike_factor=3.0)
    restored.restore(guard.state)
    assert norms_taken(restored, other, 4.0, 2.0) == [False, True]
    restored.restore({})  # of an older checkpoint
    assert norms_taken(restored, other, 100.0) == [True]


def test_an_optimizer_that_never_asks_is_refused_by_key():
    engine = SimpleNamespace(optimizer=SimpleNamespace(overflow=False))
    with pytest.raises(ValueError, match=r"learner\.engine_args: SimpleNamespace cannot leave steps out"):
        StepGuard(engine, spike_factor=0.0)
