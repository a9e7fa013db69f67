import hashlib
import io
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Event, FakeLearner, FakeTeacher

from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.manifest import damage, read_manifest
from opd_ray.protocol import CannotGoOn


class FailingLearner(FakeLearner):
    def save(self, folder: str) -> None:
        super().save(folder)  # part of it is written before the disk is full
        raise OSError("no space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(folder: Path, *steps: int, **settings: object) -> tuple[DiskCheckpoints, list[tuple[str, str]]]:
    """Return checkpoints of these steps, and what they warn of."""
    told: list[tuple[str, str]] = []
    checkpoints = DiskCheckpoints(folder=folder, warn=lambda words, kind: told.append((kind, words)), **settings)
    for step in steps:
        checkpoints.save(step, FakeLearner([]))
    return checkpoints, told


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_holds_what_the_learner_wrote_and_is_restored_from_the_same_folder(tmp_path: Path):
    checkpoints, learner = DiskCheckpoints(folder=tmp_path / "checkpoints"), FakeLearner([])
    checkpoints.save(7, learner)
    assert names(checkpoints.folder) == ["step-000007"]
    assert names(checkpoints.folder / "step-000007") == ["MANIFEST.json", "weights"]
    checkpoints.restore(7, learner)
    assert learner.events[-1] == ("restore", str(checkpoints.folder / "step-000007"))


def test_the_last_state_is_that_of_the_version_published_last_and_is_written_once(tmp_path: Path):
    checkpoints, learner = DiskCheckpoints(folder=tmp_path), FakeLearner([], version=7)
    words = checkpoints.save_last(learner)
    assert names(tmp_path) == ["step-000007"]
    assert str(tmp_path / "step-000007") in words
    assert "resume=auto goes on from update 7" in words
    assert checkpoints.save_last(learner) == words
    assert [event[0] for event in learner.events] == ["save"]


def test_before_the_first_update_there_is_no_last_state(tmp_path: Path):
    words = DiskCheckpoints(folder=tmp_path / "checkpoints").save_last(FakeLearner([]))
    assert words == "no update was finished, resume=auto starts again"
    assert names(tmp_path) == []


def test_the_learner_writes_beside_the_final_place(tmp_path: Path):
    learner = FakeLearner([])
    DiskCheckpoints(folder=tmp_path).save(7, learner)
    ((_, folder),) = learner.events
    assert Path(str(folder)).name.startswith(".")


def test_step_zero_is_the_model_as_it_was_loaded_and_restores_nothing(tmp_path: Path):
    learner = FakeLearner([])
    DiskCheckpoints(folder=tmp_path).restore(0, learner)
    assert learner.events == []


def test_a_save_that_fails_leaves_no_checkpoint_and_the_one_before_stays(tmp_path: Path):
    checkpoints, _ = written(tmp_path, 2)
    with pytest.raises(OSError, match="no space"):
        checkpoints.write(4, FailingLearner([]))
    assert names(tmp_path) == ["step-000002"]
    assert checkpoints.newest() == 2


def test_a_save_starts_from_an_empty_folder_whatever_a_killed_one_left(tmp_path: Path):
    checkpoints = DiskCheckpoints(folder=tmp_path)
    (tmp_path / ".step-000004.partial").mkdir()
    (tmp_path / ".step-000004.partial" / "half").write_text("")
    checkpoints.save(4, FakeLearner([]))
    assert names(tmp_path) == ["step-000004"]
    assert names(tmp_path / "step-000004") == ["MANIFEST.json", "weights"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    checkpoints = DiskCheckpoints(folder=tmp_path)
    checkpoints.save(4, FakeLearner([]))
    (tmp_path / "step-000004" / "stale").write_text("")
    checkpoints.save(4, FakeLearner([]))
    assert names(tmp_path / "step-000004") == ["MANIFEST.json", "weights"]


def test_saving_a_step_again_keeps_the_old_one_when_the_new_one_fails(tmp_path: Path):
    checkpoints = DiskCheckpoints(folder=tmp_path)
    checkpoints.save(4, FakeLearner([]))
    with pytest.raises(OSError, match="no space"):
        checkpoints.write(4, FailingLearner([]))
    assert damage(tmp_path / "step-000004") == ""


def test_a_checkpoint_holds_every_part_in_one_folder_and_step_0_has_none(tmp_path: Path):
    events: list[Event] = []
    checkpoints, parts = DiskCheckpoints(folder=tmp_path), (FakeLearner(events), FakeTeacher(events))
    checkpoints.save(7, *parts)
    assert [event[0] for event in events] == ["save", "save teacher"]
    assert events[0][1] == events[1][1]
    checkpoints.restore(7, *parts)
    folder = str(tmp_path / "step-000007")
    assert events[2:] == [("restore", folder), ("restore teacher", folder)]
    checkpoints.restore(0, *parts)
    assert len(events) == 4


def test_the_manifest_says_what_the_run_is_and_what_each_file_was(tmp_path: Path):
    written(tmp_path, 3, facts={"num_ranks": 2})
    manifest = read_manifest(tmp_path / "step-000003")
    assert (manifest["step"], manifest["num_ranks"]) == (3, 2)
    assert manifest["files"] == {"weights": {"bytes": 5, "sha256": hashlib.sha256(b"whole").hexdigest()}}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: flip(folder / "weights"), "weights is not as it was written"),
        (lambda folder: cut(folder / "weights"), "weights has 4 bytes, expected 5"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "MANIFEST.json").unlink(), "has no MANIFEST.json"),
        (lambda folder: (folder / "MANIFEST.json").write_text("{"), "MANIFEST.json cannot be read"),
        (lambda folder: (folder / "MANIFEST.json").write_bytes(b"\xff"), "MANIFEST.json cannot be read"),
        (lambda folder: (folder / "MANIFEST.json").write_text("[]"), "another format"),
    ],
)
def test_a_damaged_newest_one_is_set_aside_with_words_and_the_one_before_is_used(
    tmp_path: Path, harm: Callable[[Path], object], words: str
):
    checkpoints, told = written(tmp_path, 2, 4)
    harm(tmp_path / "step-000004")
    assert checkpoints.newest() == 2
    ((kind, warned),) = told
    assert kind == "checkpoint_damaged"
    assert words in warned
    assert "set aside as damaged-step-000004" in warned
    assert names(tmp_path) == ["damaged-step-000004", "step-000002"]


def test_damaged_ones_only_are_never_a_silent_start_however_often_it_is_tried(tmp_path: Path):
    checkpoints, _ = written(tmp_path, 2, 4)
    for step in (2, 4):
        cut(checkpoints.path(step) / "weights")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damaged checkpoints only \(damaged-step-000002, damaged-step-000004\)"):
            checkpoints.newest()


def test_a_damaged_one_of_the_same_step_as_one_set_aside_before_replaces_nothing(tmp_path: Path):
    checkpoints, _ = written(tmp_path, 2, 4)
    for _ in range(2):
        cut(checkpoints.path(4) / "weights")
        assert checkpoints.newest() == 2
        checkpoints.save(4, FakeLearner([]))
    assert names(tmp_path) == ["damaged-step-000004", "damaged-step-000004.1", "step-000002", "step-000004"]


def test_old_ones_go_when_a_new_one_is_there_and_not_before(tmp_path: Path):
    checkpoints, _ = written(tmp_path, 2, 4, 6, keep=2)
    assert names(tmp_path) == ["step-000004", "step-000006"]
    with pytest.raises(OSError, match="no space"):
        checkpoints.write(8, FailingLearner([]))
    assert names(tmp_path) == ["step-000004", "step-000006"]


def test_a_run_goes_on_after_saves_that_fail_and_ends_when_too_many_do_in_a_row(tmp_path: Path):
    checkpoints, told = written(tmp_path, 2, max_failed_saves=2)
    for step in (4, 6):
        checkpoints.save(step, FailingLearner([]))
    checkpoints.save(8, FakeLearner([]))  # the row is broken
    for step in (10, 12):
        checkpoints.save(step, FailingLearner([]))
    with pytest.raises(CannotGoOn, match=r"update 14 could not be written: no space .* max_failed_saves=2"):
        checkpoints.save(14, FailingLearner([]))
    assert [kind for kind, _ in told] == ["checkpoint_failed"] * 4
    assert "the newest that there is: 2" in told[0][1]
    assert checkpoints.metrics() == {"fault/failed_saves": 5}  # with the one that ended the run
    assert names(tmp_path) == ["step-000002", "step-000008"]


def save_at_once(checkpoints: DiskCheckpoints) -> None:
    checkpoints.save(6, FakeLearner([]))


def save_beside_training(checkpoints: DiskCheckpoints) -> None:
    """Part of it is written after the call."""
    late = checkpoints.folder / ".step-000006.partial" / "late"
    checkpoints.wait_saved = lambda: late.write_text("optimizer") and None
    checkpoints.save(6, FakeLearner([]))
    checkpoints.settle()


@pytest.mark.parametrize("save", [save_at_once, save_beside_training])
def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint_as_the_newest(
    tmp_path: Path, save: Callable[[DiskCheckpoints], None]
):
    """Kills a child at its n-th call that changes the disk, for every n there is."""
    found = []
    for n in range(1000):
        folder = tmp_path / str(n)
        checkpoints, _ = written(folder, 2, 4, keep=2)
        status = in_a_child_killed_at(n, lambda of_child=checkpoints: save(of_child))
        found.append(checkpoints.newest())
        assert damage(checkpoints.path(found[-1])) == ""
        shutil.rmtree(folder)
        if status == 0:
            break
    assert len(found) > 10
    assert found == sorted(found)
    assert set(found) == {4, 6}


@pytest.mark.parametrize(
    ("steps", "back_to", "left"), [((2, 4, 6), 5, 4), ((2, 4, 6), 4, 4), ((4, 6), 3, 4), ((), 3, 0)]
)
def test_going_back_takes_the_newest_before_or_else_the_oldest_and_removes_what_came_after(
    tmp_path: Path, steps: tuple[int, ...], back_to: int, left: int
):
    checkpoints, told = written(tmp_path, *steps)
    assert checkpoints.roll_back(back_to) == left
    assert checkpoints.newest() == left
    assert names(tmp_path) == [f"step-{step:06d}" for step in steps if step <= left]
    assert told == []


def in_a_child_killed_at(n: int, act: Callable[[], None]) -> int:
    """Return the exit status of a child that ends without any clean-up before its n-th call that changes the disk."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (io, "open")):
            act_on = getattr(owner, name)

            def killed(*args: Any, act_on: Any = act_on, **kwargs: Any) -> Any:
                if next(calls) == n:
                    os._exit(9)
                return act_on(*args, **kwargs)

            setattr(owner, name, killed)
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def asynchronous(folder: Path, wait_saved: Callable[[], None]) -> tuple[DiskCheckpoints, list[tuple[str, str]]]:
    checkpoints, told = written(folder, max_failed_saves=1, keep=2)
    checkpoints.wait_saved = wait_saved
    return checkpoints, told


def test_an_asynchronous_checkpoint_is_there_once_its_writers_are_done_and_not_before(tmp_path: Path):
    done, kept = threading.Event(), []
    checkpoints, told = asynchronous(tmp_path, lambda: None if done.wait(30) else pytest.fail("not waited for"))
    checkpoints.saved = lambda step, folder: kept.append((step, folder.name))
    checkpoints.save(1, FakeLearner([]))
    assert names(tmp_path) == [".step-000001.partial"]
    assert checkpoints.newest() == 0
    done.set()
    checkpoints.settle()
    assert names(tmp_path) == ["step-000001"]
    assert damage(tmp_path / "step-000001") == ""
    assert kept == [(1, "step-000001")]
    for step in (2, 3):
        checkpoints.save(step, FakeLearner([]))
    checkpoints.settle()
    assert names(tmp_path) == ["step-000002", "step-000003"]
    assert told == []


def test_an_asynchronous_save_that_fails_is_told_of_by_the_next_and_too_many_end_the_run(tmp_path: Path):
    def full() -> None:
        raise OSError("no space left on device")

    checkpoints, told = asynchronous(tmp_path, full)
    checkpoints.save(1, FakeLearner([]))
    checkpoints.save(2, FakeLearner([]))
    assert [kind for kind, _ in told] == ["checkpoint_failed"]
    assert "update 1 could not be written: no space left" in told[0][1]
    with pytest.raises(CannotGoOn, match="update 2 could not be written"):
        checkpoints.settle()
    assert names(tmp_path) == []


def test_what_is_being_written_when_its_writer_is_lost_is_forgotten(tmp_path: Path):
    def lost() -> None:
        raise RuntimeError("the actor died")

    checkpoints, told = asynchronous(tmp_path, lambda: None)
    checkpoints.save(1, FakeLearner([]))
    checkpoints.settle()
    checkpoints.wait_saved = lost
    checkpoints.save(2, FakeLearner([]))
    checkpoints.forget()
    assert checkpoints.newest() == 1
    assert names(tmp_path) == ["step-000001"]
    assert told == []


def test_the_last_state_is_written_after_the_one_under_way(tmp_path: Path):
    order: list[str] = []
    checkpoints, _ = asynchronous(tmp_path, lambda: order.append("waited"))
    checkpoints.save(6, FakeLearner([], version=6))
    checkpoints.save_last(FakeLearner([], version=7))
    assert order == ["waited", "waited"]
    assert names(tmp_path) == ["step-000006", "step-000007"]
