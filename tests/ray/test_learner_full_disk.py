"""A rank that cannot write its part of a checkpoint fails the save, and leaves no other rank waiting."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from helpers import compose_config, reference_model
from learners import make_batch, open_learner, published_weights

from opd_ray.checkpoints import DiskCheckpoints
from workers import connected
from workers.learner.worker import LearnerWorker

pytestmark = pytest.mark.ray


class FullDiskLearner(LearnerWorker):
    """A rank whose disk can be full, as torch tells it."""

    def fill_disk(self, full: bool) -> None:
        def save(_: Any, path: str, **__: Any) -> None:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file")

        torch.save = save if full and self._rank == 1 else _SAVE


_SAVE = torch.save


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_save_that_one_rank_cannot_write_leaves_nothing_and_training_goes_on(
    overrides: Callable[..., list[str]], tmp_path: Path, zero_stage: int
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = compose_config(overrides(f"learner.zero_stage={zero_stage}"))
    told: list[tuple[str, str]] = []
    checkpoints = DiskCheckpoints(
        folder=tmp_path / "checkpoints", max_failed_saves=1, warn=lambda words, kind: told.append((kind, words))
    )
    with connected(config):
        batch = make_batch(reference_model(config.teacher.path))
        learner = open_learner(config, tmp_path, FullDiskLearner)
        learner.update(batch)
        ray.get([rank.fill_disk.remote(True) for rank in learner._ranks])
        checkpoints.save(1, learner)
        ((kind, words),) = told
        assert kind == "checkpoint_failed"
        assert "update 1 could not be written" in words
        assert "PytorchStreamWriter failed writing file" in words
        assert list((tmp_path / "checkpoints").iterdir()) == []

        ray.get([rank.fill_disk.remote(False) for rank in learner._ranks])
        learner.update(batch)
        checkpoints.save(2, learner)
        saved = published_weights(learner)
        learner.update(batch)
        learner.restore(str(checkpoints.path(checkpoints.newest())))
        for name, tensor in published_weights(learner).items():
            assert torch.equal(tensor, saved[name]), name
        learner.close()
