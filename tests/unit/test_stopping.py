"""A run that cannot go on is saved, and its last words are the cause and where it can be taken up."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fakes import (
    PROMPTS_PER_STEP,
    FakeCheckpoints,
    FakeEvaluator,
    FakeLearner,
    FakeScreen,
    FakeTracker,
    fake_fleets,
    fake_window,
)

from opd_ray.assembly import run_saved
from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.controller import Loop
from opd_ray.protocol import Batch, CannotGoOn, Metrics
from opd_ray.schedule import Schedule


class FullDisk(FakeLearner):
    def save(self, folder: str) -> None:
        raise OSError(f"no space for {folder}")


def stop(folder: Path, learner: FakeLearner, *, error: Exception) -> str:
    with pytest.raises(type(error)) as caught:
        run(folder, learner, error=error)
    return str(caught.value)


def run(folder: Path, learner: FakeLearner, *, error: Exception | None) -> None:
    fleets = replace(fake_fleets([]), learner=learner)
    loop = Loop(
        schedule=Schedule(num_steps=4, max_staleness=0, eval_every=0, save_every=0),
        fleets=fleets,
        window=fake_window(fleets, num_steps=4),
        screen=StoppingScreen([], error=error),
        evaluator=FakeEvaluator([]),
        checkpoints=FakeCheckpoints([]),
        tracker=FakeTracker([]),
    )
    run_saved(loop, step=learner.version, checkpoints=DiskCheckpoints(folder=folder))


@dataclass
class StoppingScreen(FakeScreen):
    error: Exception | None = None

    def whole(self, batch: Batch) -> tuple[Batch, Metrics]:
        if self.error is not None:
            raise self.error
        return super().whole(batch)


def test_the_last_update_is_saved_and_named_after_the_cause(tmp_path: Path):
    words = stop(tmp_path, FakeLearner([], version=3), error=CannotGoOn("the teacher is gone"))
    assert words.startswith("the teacher is gone; ")
    assert words.endswith("resume=auto goes on from update 3")
    assert (tmp_path / "step-000003" / "MANIFEST.json").exists()


def test_the_cause_is_told_even_when_nothing_can_be_saved(tmp_path: Path):
    words = stop(tmp_path, FullDisk([], version=3), error=CannotGoOn("the teacher is gone"))
    assert words.startswith("the teacher is gone; no checkpoint could be written: no space for")


def test_the_places_in_flight_are_saved_with_it(tmp_path: Path):
    stop(tmp_path, FakeLearner([], version=3), error=CannotGoOn("the teacher is gone"))
    state = json.loads((tmp_path / "step-000003" / "window.json").read_text())
    assert state["in_flight"] == [3 * PROMPTS_PER_STEP + i for i in range(PROMPTS_PER_STEP)]


def test_other_errors_pass_and_save_nothing(tmp_path: Path):
    assert stop(tmp_path, FakeLearner([], version=3), error=RuntimeError("a worker died")) == "a worker died"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_well_saves_nothing(tmp_path: Path):
    run(tmp_path, FakeLearner([], version=3), error=None)
    assert list(tmp_path.iterdir()) == []
