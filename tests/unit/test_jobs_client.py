"""What is asked of a cluster's dashboard, and how its refusals are told: a client in the place of Ray's."""

import errno
from typing import Any

import pytest
from config_files import refusal
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from opd_ray import jobs
from opd_ray.jobs import Job, Jobs, result_in, tell_result
from opd_ray.submit import job_of


class Info:
    def __init__(self, name: str, status: JobStatus) -> None:
        self.submission_id, self.status, self.message = name, status, "as asked"


class Client:
    """One job at a time, whose output is all that jobs of this name have printed."""

    def __init__(self, status: JobStatus | None = None) -> None:
        self.jobs = [Info("run", status)] if status else []
        self.submitted: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.logs = "older words\n"
        self.fault: Exception | None = None

    def list_jobs(self) -> list[Info]:
        return self.jobs

    def delete_job(self, name: str) -> None:
        self.deleted.append(name)

    def submit_job(self, **given: Any) -> None:
        if self.fault:
            raise self.fault
        self.submitted.append(given)
        self.jobs = [Info(given["submission_id"], JobStatus.SUCCEEDED)]
        self.logs += given["entrypoint"].split("'")[1] + "\nnew words\n"

    def get_job_logs(self, _: str) -> str:
        return self.logs


def reach(monkeypatch: pytest.MonkeyPatch, client: Client) -> Jobs:
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda _: client)
    return Jobs("http://head:8265")


JOB = Job(name="run", overrides=["experiment=demo", "name=run"], grace_s=90, env={"A": "1"})


def test_a_run_is_submitted_under_its_name_with_its_grace_time_and_without_a_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    client = Client()
    reach(monkeypatch, client).start(JOB)
    (given,) = client.submitted
    assert given["submission_id"] == "run"
    assert given["entrypoint"].endswith("; exec python -m opd_ray.train experiment=demo name=run")
    assert given["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "90", "A": "1"}
    assert given["runtime_env"]["working_dir"] == str(jobs.PROJECT)
    assert "s3cret" not in str(given)


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING])
def test_a_run_that_goes_on_is_not_submitted_again(monkeypatch: pytest.MonkeyPatch, status: JobStatus):
    client = Client(status)
    words = refusal(lambda: reach(monkeypatch, client).start(JOB))
    assert f"run: a job of this name is {status.value.lower()} already" in words
    assert not client.submitted


@pytest.mark.parametrize("status", [JobStatus.STOPPED, JobStatus.FAILED, JobStatus.SUCCEEDED])
def test_a_run_that_has_ended_makes_room_and_its_output_is_not_shown_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: JobStatus
):
    client = Client(status)
    reached = reach(monkeypatch, client)
    first_line = reached.start(JOB)
    assert client.deleted == ["run"]
    assert reached.follow("run", first_line=first_line, every_s=0) is JobStatus.SUCCEEDED
    assert capsys.readouterr().out == "new words\n"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (AuthenticationError("no"), "asks for a token; expected RAY_AUTH_MODE=token"),
        (ConnectionError("refused\nand more"), "no Ray dashboard answers there (refused); expected the address"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room to pack"),
        (RuntimeError("Request failed with status code 500: disk full\ntrace"), "Request failed with status code 500"),
    ],
)
def test_a_refusal_of_the_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch, fault: Exception, words: str):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    client = Client()
    client.fault = fault
    told = refusal(lambda: reach(monkeypatch, client).start(JOB))
    assert words in told
    assert "\n" not in told


def test_a_submitted_run_lies_on_an_absolute_path_and_can_be_taken_up_again():
    job = job_of(["experiment=demo", "name=mine"], grace_s=5)
    assert job.name == "mine"
    assert "resume=auto" in job.overrides
    assert any(o.startswith("runs_dir=/") for o in job.overrides)
    told = job_of(["experiment=demo", "resume=overwrite", "runs_dir=/shared"], grace_s=5)
    assert "resume=auto" not in told.overrides
    assert [o for o in told.overrides if o.startswith("runs_dir=")] == ["runs_dir=/shared"]


def test_a_runs_figures_reach_the_launcher_only_when_it_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tell_result({"steps": 2.0})
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(jobs.TELL_RESULT, "1")
    tell_result({"steps": 2.0})
    assert result_in("words\n" + capsys.readouterr().out + "more\n") == {"steps": 2.0}
    assert result_in("words\n") == {}
