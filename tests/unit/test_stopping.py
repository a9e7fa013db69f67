"""A run that cannot go on is saved, and its last words are the cause and where it can be taken up."""

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeLearner, fake_fleets

from opd_ray.assembly import saved_when_stopped
from opd_ray.protocol import CannotGoOn
from opd_ray.state import DiskCheckpoints


class FullDisk(FakeLearner):
    def save(self, folder: str) -> None:
        raise OSError(f"no space for {folder}")


def stop(folder: Path, learner: FakeLearner, *, error: Exception) -> str:
    fleets = replace(fake_fleets([]), learner=learner)
    with pytest.raises(type(error)) as caught, saved_when_stopped(DiskCheckpoints(folder=folder), fleets):
        raise error
    return str(caught.value)


def test_the_last_update_is_saved_and_named_after_the_cause(tmp_path: Path):
    words = stop(tmp_path, FakeLearner([], version=3), error=CannotGoOn("the teacher is gone"))
    assert words.startswith("the teacher is gone; ")
    assert words.endswith("resume=auto goes on from update 3")
    assert (tmp_path / "step-000003" / "state.json").exists()


def test_the_cause_is_told_even_when_nothing_can_be_saved(tmp_path: Path):
    words = stop(tmp_path, FullDisk([], version=3), error=CannotGoOn("the teacher is gone"))
    assert words.startswith("the teacher is gone; no checkpoint could be written: no space for")


def test_other_errors_pass_and_save_nothing(tmp_path: Path):
    learner = FakeLearner([], version=3)
    assert stop(tmp_path, learner, error=RuntimeError("a worker died")) == "a worker died"
    assert learner.events == []


def test_a_run_that_ends_well_saves_nothing(tmp_path: Path):
    learner = FakeLearner([], version=3)
    fleets = replace(fake_fleets([]), learner=learner)
    with saved_when_stopped(DiskCheckpoints(folder=tmp_path), fleets):
        pass
    assert learner.events == []
