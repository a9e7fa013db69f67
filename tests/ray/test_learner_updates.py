"""Several optimizer steps on one batch: the same as so many batches of the parts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import compose_config, reference_model
from learners import make_batch, open_learner, published_weights

from opd_ray.config.schema import LrSchedule
from opd_ray.protocol import Batch
from workers import connected
from workers.learner.fleet import batch_parts

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_two_updates_on_a_batch_are_two_updates_on_its_interleaved_parts(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    common = ("learner.num_ranks=1", "learner.lr_schedule=linear", "learner.max_tokens_per_micro_batch=32")
    both = compose_config(overrides(*common, "num_steps=4", "learner.updates_per_batch=2"))
    single = compose_config(overrides(*common, "num_steps=8"))
    assert both.learner.lr_schedule is LrSchedule.linear
    with connected(both):
        batch = make_batch(reference_model(both.teacher.path))
        learner = open_learner(both, tmp_path)
        metrics = learner.update(batch)
        published = published_weights(learner)
        learner.close()
        learner = open_learner(single, tmp_path)
        first, second = (learner.update(_part(batch, positions)) for positions in batch_parts(4, 2))
        expected = published_weights(learner)
        learner.close()

    assert metrics["train/num_updates"] == 2
    assert first["train/num_updates"] == 1
    assert (first["train/lr"], second["train/lr"]) == (pytest.approx(0.01), pytest.approx(0.01 * 7 / 8))
    assert metrics["train/lr"] == second["train/lr"]  # of 4 x 2 steps, the second
    assert metrics["train/grad_norm_max"] == max(first["train/grad_norm"], second["train/grad_norm"])
    assert published.keys() == expected.keys()
    for name, tensor in published.items():
        assert torch.equal(tensor, expected[name]), name


def _part(batch: Batch, positions: range) -> Batch:
    return replace(batch, groups=[batch.groups[i] for i in positions], scores=[batch.scores[i] for i in positions])
