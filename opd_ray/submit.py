"""Submits a run to a Ray cluster and follows it: `python -m opd_ray.submit experiment=X name=Y key=value ...`.

The run's name is the job's id. A run that goes on is not submitted again; one that was stopped or has failed goes on
from its newest checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from ray.job_submission import JobStatus

from opd_ray.config.cli import check_overrides
from opd_ray.config.load import load, register_schema
from opd_ray.jobs import PROJECT, Job, Jobs, lasting_runs_dir

_CONFIG_DIR = PROJECT / "configs"
_RUN_FAILED, _USER_ERROR, _INTERRUPTED = 1, 2, 130  # exit codes
_GRACE_S = 600


def job_of(overrides: Sequence[str], *, grace_s: int) -> Job:
    """Return the job of a command line. Raises ValueError for overrides that do not compose or do not fit together.

    A relative runs_dir would lie in what Ray unpacks and later deletes: it is taken from where the command is given.
    """
    register_schema()
    checked = check_overrides(overrides, config_dir=_CONFIG_DIR)
    with initialize_config_dir(str(_CONFIG_DIR), version_base="1.3"):
        config = load(compose("train", overrides=checked))
    given = {override.partition("=")[0] for override in checked}
    added = [*([] if "resume" in given else ["resume=auto"]), *lasting_runs_dir(config.runs_dir)]
    return Job(name=config.name, overrides=[*checked, *added], grace_s=grace_s, env={})


def main() -> None:
    """Submit what the command line says; the exit code is the run's success."""
    parser = argparse.ArgumentParser(
        prog="python -m opd_ray.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`ray job stop NAME` ends a run: it writes a checkpoint, and the same command goes on from there.",
    )
    parser.add_argument("--address", help="the cluster's dashboard, http://host:8265; else RAY_API_SERVER_ADDRESS")
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is submitted")
    parser.add_argument(
        "--grace",
        type=int,
        default=_GRACE_S,
        metavar="S",
        help="seconds that a stopped run has to save itself (%(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of opd_ray.train")
    options = parser.parse_intermixed_args()
    try:
        job = job_of(options.overrides, grace_s=options.grace)
        jobs = Jobs(options.address)
        first_line = jobs.start(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(_USER_ERROR) from None
    print(f"submitted {job.name}: {job.command}", flush=True)
    if not options.no_wait:
        _follow(jobs, job, first_line=first_line)


def _follow(jobs: Jobs, job: Job, *, first_line: str) -> None:
    try:
        status = jobs.follow(job.name, first_line=first_line)
    except ValueError as error:
        print(f"error: {error}; the job may go on", file=sys.stderr)
        raise SystemExit(_RUN_FAILED) from None
    except KeyboardInterrupt:
        print(f"\n{job.name} goes on: `ray job logs --follow {job.name}` shows it, `ray job stop {job.name}` ends it")
        raise SystemExit(_INTERRUPTED) from None
    print(
        f"{job.name}: {status.value.lower()}"
        + ("" if status is JobStatus.SUCCEEDED else f" ({jobs.message(job.name)})")
    )
    if status is not JobStatus.SUCCEEDED:
        raise SystemExit(_RUN_FAILED)


if __name__ == "__main__":
    main()
