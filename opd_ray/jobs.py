"""Runs as jobs of a Ray cluster: finds the cluster, submits, follows; every refusal of the cluster in one sentence."""

import errno
import json
import logging
import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from opd_ray.config.schema import Config

PROJECT = Path(__file__).resolve().parents[1]  # what a job is given to run from; .rayignore says what stays behind
RESULT_PREFIX = "opd-ray result "  # of the line that tells a launcher the run's figures
TELL_RESULT = "OPD_RAY_TELL_RESULT"  # asks a run for that line
# Loggers that tell of every file which is not uploaded.
_CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk")
_UNPACKED = "working_dir_files"  # part of the path where Ray unpacks what a job has uploaded
_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray kills a stopped job after 3 seconds unless told otherwise
_TOKEN = (
    "expected RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or in"
    " ~/.ray/auth_token (`ray get-auth-token` prints it on the head node)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run as it is submitted."""

    name: str  # of the run, and the submission id
    overrides: Sequence[str]  # of `python -m opd_ray.train`
    grace_s: int  # how long a stopped run has to write its checkpoint
    env: Mapping[str, str]  # of the run; recorded by Ray in clear text

    @property
    def command(self) -> str:
        """Return the command, quoted for the shell."""
        return shlex.join(["python", "-m", "opd_ray.train", *self.overrides])


class Jobs:
    """The jobs of one cluster. Every method raises ValueError for what a user can mend."""

    def __init__(self, address: str | None) -> None:
        """Reach a dashboard: http://host:8265; None: RAY_API_SERVER_ADDRESS, or the cluster of this machine."""
        self._where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        if not self._where.startswith(("http://", "https://")):
            raise ValueError(
                f"address={self._where}: expected the dashboard's address, such as http://head:8265 (6379 is the port"
                " of `ray start --address`, not of jobs)"
            )
        for chatty in _CHATTY:
            logging.getLogger(chatty).setLevel(logging.ERROR)
        self._client: Any = self._ask(JobSubmissionClient, self._where)

    def start(self, job: Job) -> str:
        """Submit a run under its name; one that has ended makes room, one that goes on is refused.

        Returns the first line that it prints: the output of those before it, under the same name, stands above.
        """
        before = self.status(job.name)
        if before is not None and not before.is_terminal():
            raise ValueError(
                f"{job.name}: a job of this name is {before.value.lower()} already; stop it with `ray job stop"
                f" {job.name}`, or submit another name=..."
            )
        if before is not None:
            self._ask(self._client.delete_job, job.name)
        first_line = f"{job.name}, submitted {time.strftime('%Y-%m-%d %H:%M:%S')} ({uuid.uuid4().hex[:6]})"
        self._ask(
            self._client.submit_job,
            entrypoint=f"echo {shlex.quote(first_line)}; exec {job.command}",
            submission_id=job.name,
            runtime_env={"working_dir": str(PROJECT), "env_vars": {_GRACE: str(job.grace_s), **job.env}},
        )
        return first_line

    def status(self, name: str) -> JobStatus | None:
        """Return how a job stands; None: there is none of this name."""
        known = {info.submission_id: info.status for info in self._ask(self._client.list_jobs)}
        return known.get(name)

    def output(self, name: str, *, first_line: str) -> str:
        """Return what a job has printed after its first line; nothing before that."""
        return str(self._ask(self._client.get_job_logs, name)).partition(f"{first_line}\n")[2]

    def message(self, name: str) -> str:
        """Return what the cluster says of a job's state."""
        return str(self._ask(self._client.get_job_info, name).message or "")

    def stop(self, name: str) -> None:
        """Tell a job to end; it has its grace time to write a checkpoint."""
        self._ask(self._client.stop_job, name)

    def follow(self, name: str, *, first_line: str, every_s: float = 1.0) -> JobStatus:
        """Print what a job prints until it ends; return how it ended."""
        shown = 0
        while True:
            status = self.status(name)
            text = self.output(name, first_line=first_line)
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
            if status is None or status.is_terminal():
                return status or JobStatus.STOPPED
            time.sleep(every_s)

    def _ask(self, call: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except AuthenticationError:
            sent = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
            fault = "the cluster refuses the token that was sent" if sent else "the cluster asks for a token"
            raise ValueError(f"address={self._where}: {fault}; {_TOKEN}") from None
        except OSError as error:  # a refused connection is one
            if error.errno == errno.ENOSPC:
                raise ValueError(
                    f"no room to pack {PROJECT} for the upload in {tempfile.gettempdir()}: free some, set TMPDIR to"
                    " another disk, or list what the run does not need in .rayignore"
                ) from None
            raise ValueError(
                f"address={self._where}: no Ray dashboard answers there ({_first_line(error)}); expected the address of"
                " a head node, such as http://head:8265, in --address, hydra.launcher.address or RAY_API_SERVER_ADDRESS"
            ) from None
        except RuntimeError as error:
            raise ValueError(f"{self._where}: {_first_line(error)}") from None


def tell_result(summary: Mapping[str, float]) -> None:
    """Print a run's figures for the launcher of a sweep, where one has asked for them."""
    if os.environ.get(TELL_RESULT):
        print(RESULT_PREFIX + json.dumps(dict(summary)), flush=True)


def result_in(logs: str) -> dict[str, float]:
    """Return the figures that a run's output tells; none from one that did not get so far."""
    lines = [line for line in logs.splitlines() if line.startswith(RESULT_PREFIX)]
    return dict(json.loads(lines[-1].removeprefix(RESULT_PREFIX))) if lines else {}


def lasting_runs_dir(runs_dir: str) -> list[str]:
    """Return the override that makes a relative runs_dir lie here, not in the folder that Ray unpacks and deletes."""
    return [] if Path(runs_dir).is_absolute() else [f"runs_dir={Path(runs_dir).resolve()}"]


def lost_with_the_job(config: Config) -> list[str]:
    """Return a warning where the run dir would lie in a job's uploaded folder, which Ray deletes some time."""
    here = Path.cwd()
    if Path(config.runs_dir).is_absolute() or _UNPACKED not in here.parts:
        return []
    return [
        f"runs_dir={config.runs_dir} lies in the job's uploaded folder {here}, which Ray deletes once it is not used:"
        " give an absolute path on lasting storage"
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
