"""Gradients that are not finite on one rank change nothing on any: the run goes on as if the batch had not been."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from helpers import compose_config, reference_model
from learners import make_batch, open_learner, published_weights

from opd_ray.objectives import Losses
from opd_ray.protocol import CannotGoOn
from workers import MustRollBack, connected
from workers.learner.worker import LearnerWorker

pytestmark = pytest.mark.ray


class PoisonedLearner(LearnerWorker):
    """Rank 1 can be given a loss whose gradients are not finite."""

    _poison = 1.0

    def poison(self, factor: float) -> None:
        self._poison = factor if self._rank == 1 else 1.0

    def _forward(self, *micro_batch: Any, **how: Any) -> Losses:
        losses = super()._forward(*micro_batch, **how)
        return replace(losses, loss=losses.loss * self._poison)


@pytest.fixture(autouse=True)
def by_value() -> None:
    """Have the worker class travel whole: the ranks do not know this module."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _poison(learner: Any, factor: float) -> None:
    ray.get([rank.poison.remote(factor) for rank in learner.ranks])


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "factor"),
    [
        (0, "float32", float("nan")),
        pytest.param(2, "bfloat16", float("inf"), marks=pytest.mark.slow),
        pytest.param(0, "bfloat16", float("nan"), marks=pytest.mark.slow),
        pytest.param(2, "float32", float("nan"), marks=pytest.mark.slow),
        pytest.param(3, "float32", float("inf"), marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", float("nan"), marks=pytest.mark.slow),
    ],
)
def test_a_poisoned_batch_leaves_weights_optimizer_and_schedule_as_they_were(
    overrides: Callable[..., list[str]], tmp_path: Path, zero_stage: int, dtype: str, factor: float
) -> None:
    chosen = ("learner.lr_schedule=linear", "num_steps=9", "learner.max_skipped_steps=2", "deterministic=true")
    config = compose_config(overrides(f"learner.zero_stage={zero_stage}", f"learner.dtype={dtype}", *chosen))
    with connected(config):
        batch = make_batch(reference_model(config.teacher.path))
        plain = open_learner(config, tmp_path, PoisonedLearner)
        for _ in range(2):
            expected_metrics = plain.update(batch)
        expected = published_weights(plain)
        plain.close()

        learner = open_learner(config, tmp_path, PoisonedLearner)
        learner.update(batch)
        before = published_weights(learner)
        for _ in range(2):
            _poison(learner, factor)
            assert learner.update(batch)["fault/skipped_steps"] == 1
        for name, tensor in published_weights(learner).items():
            assert torch.equal(tensor, before[name]), name
        _poison(learner, 1.0)
        metrics = learner.update(batch)
        assert metrics["fault/skipped_steps"] == 0
        assert metrics["train/lr"] == expected_metrics["train/lr"]
        for name, tensor in published_weights(learner).items():
            assert torch.equal(tensor, expected[name]), name

        _poison(learner, factor)
        for _ in range(2):
            learner.update(batch)
        with pytest.raises(CannotGoOn, match=r"not finite; .* left out: 3; .*max_skipped_steps=2"):
            learner.update(batch)
        learner.close()


@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [
        (2, "float32"),
        pytest.param(0, "float32", marks=pytest.mark.slow),
        pytest.param(0, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(3, "float32", marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_spike_changes_nothing_also_after_a_checkpoint(
    overrides: Callable[..., list[str]], tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    chosen = ("learner.spike_factor=20", "learner.max_skipped_steps=1", "learner.on_skipped_steps=rollback")
    config = compose_config(overrides(f"learner.zero_stage={zero_stage}", f"learner.dtype={dtype}", *chosen))
    with connected(config):
        batch = make_batch(reference_model(config.teacher.path))
        learner = open_learner(config, tmp_path, PoisonedLearner)
        usual = [learner.update(batch)["train/grad_norm"] for _ in range(8)]
        learner.save(str(tmp_path / "state"))
        learner.close()

        learner = open_learner(config, tmp_path, PoisonedLearner)
        learner.restore(str(tmp_path / "state"))
        before = published_weights(learner)
        _poison(learner, 1e3)
        metrics = learner.update(batch)
        assert metrics["fault/skipped_steps"] == metrics["fault/spikes"] == 1
        assert metrics["train/grad_norm"] > 20 * max(usual)
        for name, tensor in published_weights(learner).items():
            assert torch.equal(tensor, before[name]), name
        _poison(learner, 1.0)
        metrics = learner.update(batch)
        assert metrics["fault/skipped_steps"] == metrics["fault/spikes"] == 0
        assert any(not torch.equal(tensor, before[name]) for name, tensor in published_weights(learner).items())

        _poison(learner, 1e3)
        learner.update(batch)
        with pytest.raises(MustRollBack, match=r"gradients spiked; .* left out: 2") as fault:
            learner.update(batch)
        assert (fault.value.first, fault.value.last) == (batch.step - 1, batch.step)  # batches told apart by number
        learner.close()
