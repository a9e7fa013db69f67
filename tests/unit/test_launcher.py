"""The launcher's bookkeeping: how many trials run at once, what each is submitted as, what the sweeper is told."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from config_files import compose_raw
from omegaconf import OmegaConf, open_dict
from ray.job_submission import JobStatus

from opd_ray import launcher
from opd_ray.jobs import RESULT_PREFIX, Job
from opd_ray.launcher import RayJobsLauncher
from opd_ray.sweep import read_trials


class Cluster:
    """Every job runs for two looks and then ends as it is told to."""

    def __init__(self, ends: dict[str, str] | None = None) -> None:
        self.ends = ends or {}
        self.started: list[Job] = []
        self.looks: dict[str, int] = {}
        self.most_at_once = 0
        self.away = False

    def start(self, job: Job) -> str:
        if self.ends.get(job.name) == "refused":
            raise ValueError(f"{job.name}: a job of this name is running already")
        self.started.append(job)
        self.looks[job.name] = 0
        self.most_at_once = max(self.most_at_once, sum(looks < 2 for looks in self.looks.values()))
        return "first line"

    def status(self, name: str) -> JobStatus:
        if self.away:
            raise ValueError("no Ray dashboard answers there")
        self.looks[name] += 1
        ended = JobStatus.FAILED if self.ends.get(name) == "failed" else JobStatus.SUCCEEDED
        return ended if self.looks[name] >= 2 else JobStatus.RUNNING

    def output(self, name: str, *, first_line: str) -> str:
        assert first_line == "first line"
        if self.ends.get(name) == "failed":
            return "words\nerror: learner.lr=-1: expected a number above 0\n"
        number = name.rpartition("-")[2]
        return f'words\n{RESULT_PREFIX}{{"reverse_kl_after": 0.{number}}}\n'

    def message(self, _: str) -> str:
        return "no words"


def launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cluster: Cluster, *overrides: str, max_concurrent: int = 2
) -> list[Any]:
    monkeypatch.setattr(launcher, "Jobs", lambda _: cluster)
    monkeypatch.setattr(launcher, "_POLL_S", 0.0)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})

    def load(_: Any, given: list[str]) -> Any:
        composed = compose_raw("experiment=demo", *given)
        with open_dict(composed):
            composed.hydra = {"job": {}}
        return composed

    of_hydra = SimpleNamespace(config_loader=SimpleNamespace(load_sweep_config=load))
    tried = RayJobsLauncher(None, max_concurrent)
    tried.setup(hydra_context=of_hydra, task_function=None, config=config)
    return list(tried.launch([[override] for override in overrides], 3))


def test_every_trial_is_a_job_of_its_own_name_and_group_and_the_sweeper_is_told_its_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    cluster = Cluster()
    returned = launch(monkeypatch, tmp_path, cluster, "learner.lr=0.1", "learner.lr=0.2", "learner.lr=0.3")
    assert [job.name for job in cluster.started] == ["demo-3", "demo-4", "demo-5"]
    assert cluster.most_at_once == 2
    first = cluster.started[0].overrides
    assert {"learner.lr=0.1", "name=demo-3", "tracking.group=demo"} <= set(first)
    assert any(override.startswith("runs_dir=/") for override in first)
    assert [r.return_value for r in returned] == [0.3, 0.4, 0.5]
    trials = read_trials(tmp_path)
    assert [(t.number, t.name, t.status, t.value) for t in trials] == [
        (3, "demo-3", "finished", 0.3),
        (4, "demo-4", "finished", 0.4),
        (5, "demo-5", "finished", 0.5),
    ]


def test_a_trial_that_fails_or_is_refused_is_told_as_nan_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    cluster = Cluster({"demo-3": "failed", "demo-4": "refused"})
    returned = launch(monkeypatch, tmp_path, cluster, "seed=1", "seed=2", "seed=3")
    assert [math.isnan(r.return_value) for r in returned] == [True, True, False]
    failed, refused, finished = read_trials(tmp_path)
    assert (failed.status, failed.error) == ("failed", "learner.lr=-1: expected a number above 0")
    assert "running already" in refused.error
    assert finished.status == "finished"


@pytest.mark.parametrize(
    ("away", "max_concurrent", "words"),
    [
        (True, 1, "error: no Ray dashboard answers there; the trials that are submitted go on"),
        (False, 0, "error: hydra.launcher.max_concurrent=0: expected an integer of at least 1"),
    ],
)
def test_what_ends_a_sweep_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    away: bool,
    max_concurrent: int,
    words: str,
):
    cluster = Cluster()
    cluster.away = away
    with pytest.raises(SystemExit) as ended:
        launch(monkeypatch, tmp_path, cluster, "seed=1", max_concurrent=max_concurrent)
    assert ended.value.code == 2
    assert capsys.readouterr().err == words + "\n"
