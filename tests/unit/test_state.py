from pathlib import Path

import pytest
from fakes import Event, FakeLearner, FakeTeacher

from opd_ray.config.schema import ResumePolicy
from opd_ray.state import DiskCheckpoints, RunDir, check_free, claim


class FailingLearner(FakeLearner):
    def save(self, folder: str) -> None:
        super().save(folder)  # part of it is written before the disk is full
        raise OSError("no space left on device")


def make_run(path: Path, *, steps: tuple[int, ...] = ()) -> RunDir:
    """Leave a run dir as a run does that wrote these checkpoints."""
    run_dir = RunDir(path=path)
    path.mkdir()
    (path / "config.yaml").write_text("name: old\n")
    (path / "metrics.jsonl").write_text('{"step": 0}\n')
    for step in steps:
        DiskCheckpoints(folder=run_dir.checkpoints).save(step, FakeLearner([]))
    return run_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("policy", ResumePolicy)
def test_a_run_dir_that_is_not_there_is_free_and_starts_at_zero(tmp_path: Path, policy: ResumePolicy):
    run_dir = RunDir(path=tmp_path / "runs" / "new")
    check_free(run_dir, policy)
    assert claim(run_dir, policy) == 0
    assert run_dir.path.is_dir()


@pytest.mark.parametrize("policy", ResumePolicy)
def test_an_empty_folder_is_free(tmp_path: Path, policy: ResumePolicy):
    check_free(RunDir(path=tmp_path), policy)


def test_checking_writes_nothing(tmp_path: Path):
    check_free(RunDir(path=tmp_path / "new"), ResumePolicy.never)
    assert names(tmp_path) == []


def test_another_run_is_refused_with_the_three_ways_out(tmp_path: Path):
    run_dir = make_run(tmp_path / "old")
    with pytest.raises(ValueError, match=r"holds another run: resume=auto .* resume=overwrite .* name=") as error:
        check_free(run_dir, ResumePolicy.never)
    assert str(run_dir.path) in str(error.value)


@pytest.mark.parametrize("policy", [ResumePolicy.auto, ResumePolicy.overwrite])
def test_another_run_is_no_fault_when_the_policy_says_what_to_do(tmp_path: Path, policy: ResumePolicy):
    check_free(make_run(tmp_path / "old"), policy)


@pytest.mark.parametrize("policy", ResumePolicy)
def test_a_file_in_the_place_of_the_run_dir_is_refused(tmp_path: Path, policy: ResumePolicy):
    (tmp_path / "old").write_text("")
    with pytest.raises(ValueError, match="is a file: choose another name="):
        check_free(RunDir(path=tmp_path / "old"), policy)


def test_auto_picks_the_newest_checkpoint_by_number_and_keeps_what_is_there(tmp_path: Path):
    run_dir = make_run(tmp_path / "old", steps=(20, 100, 3))
    assert claim(run_dir, ResumePolicy.auto) == 100
    assert (run_dir.path / "metrics.jsonl").exists()


def test_auto_starts_at_zero_without_a_checkpoint(tmp_path: Path):
    assert claim(make_run(tmp_path / "old"), ResumePolicy.auto) == 0


def test_auto_passes_over_a_folder_that_was_never_finished(tmp_path: Path):
    run_dir = make_run(tmp_path / "old", steps=(2,))
    (run_dir.checkpoints / "step-000009").mkdir()
    assert claim(run_dir, ResumePolicy.auto) == 2


def test_overwrite_removes_the_old_run_whole(tmp_path: Path):
    run_dir = make_run(tmp_path / "old", steps=(5,))
    assert claim(run_dir, ResumePolicy.overwrite) == 0
    assert names(run_dir.path) == []


def test_overwrite_does_not_touch_a_folder_that_holds_no_run(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    claim(RunDir(path=tmp_path), ResumePolicy.overwrite)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_checkpoint_holds_what_the_learner_wrote_and_is_restored_from_the_same_folder(tmp_path: Path):
    checkpoints, learner = DiskCheckpoints(folder=tmp_path / "checkpoints"), FakeLearner([])
    checkpoints.save(7, learner)
    assert names(checkpoints.folder) == ["step-000007"]
    assert names(checkpoints.folder / "step-000007") == ["state.json", "weights"]
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
    run_dir = make_run(tmp_path / "old", steps=(2,))
    checkpoints = DiskCheckpoints(folder=run_dir.checkpoints)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(4, FailingLearner([]))
    assert [path.name for path in run_dir.checkpoints.glob("step-*")] == ["step-000002"]
    assert claim(run_dir, ResumePolicy.auto) == 2


def test_a_save_after_a_failed_one_starts_from_an_empty_folder(tmp_path: Path):
    checkpoints = DiskCheckpoints(folder=tmp_path)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(4, FailingLearner([]))
    (tmp_path / ".step-000004.partial" / "half").write_text("")
    checkpoints.save(4, FakeLearner([]))
    assert names(tmp_path) == ["step-000004"]
    assert names(tmp_path / "step-000004") == ["state.json", "weights"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    checkpoints = DiskCheckpoints(folder=tmp_path)
    checkpoints.save(4, FakeLearner([]))
    (tmp_path / "step-000004" / "stale").write_text("")
    checkpoints.save(4, FakeLearner([]))
    assert names(tmp_path / "step-000004") == ["state.json", "weights"]


def test_saving_a_step_again_keeps_the_old_one_when_the_new_one_fails(tmp_path: Path):
    checkpoints = DiskCheckpoints(folder=tmp_path)
    checkpoints.save(4, FakeLearner([]))
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(4, FailingLearner([]))
    assert (tmp_path / "step-000004" / "state.json").exists()


def test_the_run_dir_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from config_files import compose_config

    monkeypatch.chdir(tmp_path)
    run_dir = RunDir.of(compose_config("experiment=demo", "name=mine", "runs_dir=out"))
    assert run_dir.path == (tmp_path / "out" / "mine").resolve()
    assert run_dir.export.parent == run_dir.logs.parent == run_dir.checkpoints.parent == run_dir.path


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
