from pathlib import Path

import pytest

from opd_ray.config.schema import ResumePolicy
from opd_ray.state import RunDir, check_free, claim


def make_run(path: Path) -> RunDir:
    """Leave a run dir as a run does."""
    path.mkdir()
    (path / "config.yaml").write_text("name: old\n")
    (path / "metrics.jsonl").write_text('{"step": 0}\n')
    return RunDir(path=path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("policy", ResumePolicy)
def test_a_run_dir_that_is_not_there_is_free(tmp_path: Path, policy: ResumePolicy):
    run_dir = RunDir(path=tmp_path / "runs" / "new")
    check_free(run_dir, policy)
    claim(run_dir, policy)
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


def test_auto_keeps_what_is_there(tmp_path: Path):
    run_dir = make_run(tmp_path / "old")
    claim(run_dir, ResumePolicy.auto)
    assert (run_dir.path / "metrics.jsonl").exists()


def test_overwrite_removes_the_old_run_whole(tmp_path: Path):
    run_dir = make_run(tmp_path / "old")
    claim(run_dir, ResumePolicy.overwrite)
    assert names(run_dir.path) == []


def test_overwrite_does_not_touch_a_folder_that_holds_no_run(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    claim(RunDir(path=tmp_path), ResumePolicy.overwrite)
    assert names(tmp_path) == ["thesis.tex"]


def test_the_run_dir_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from config_files import compose_config

    monkeypatch.chdir(tmp_path)
    run_dir = RunDir.of(compose_config("experiment=demo", "name=mine", "runs_dir=out"))
    assert run_dir.path == (tmp_path / "out" / "mine").resolve()
    assert run_dir.export.parent == run_dir.logs.parent == run_dir.checkpoints.parent == run_dir.path


def test_a_run_dir_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="old cannot be written: choose another runs_dir"):
        claim(make_run(tmp_path / "old"), ResumePolicy.auto)
