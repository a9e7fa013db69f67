"""A worker dies or hangs in a run: the same job ends with the weights of a run that nothing befell.

Every point where that can happen is in `make chaos`; here are two in one run, and what a plan cannot reach.
"""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import Outcome, run_to_end, worker_process

from workers.fault_plan import Action, At, Phase

pytestmark = pytest.mark.ray

_LIMIT_S = 300
_TEACHER_GONE = At(step=1, phase=Phase.score, role="teacher", index=0, action=Action.sigkill)
_RANK_GONE = At(step=3, phase=Phase.backward, role="learner", index=1, action=Action.sigkill)


def _check_ended_well(outcome: Outcome, *, num_steps: int) -> None:
    assert outcome.exit_code == 0, outcome.output
    assert outcome.steps == list(range(num_steps + 1))


@pytest.mark.timeout(900)
def test_a_run_that_loses_a_teacher_and_a_learner_ends_with_the_weights_of_one_that_does_not(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The teacher alone is started anew; for the learner, all are, from a checkpoint written beside training."""
    arguments = overrides(
        "num_steps=4", "save_every=2", "async_save=true", "deterministic=true", "eval_every=4", "fault.backoff_s=0.1"
    )
    runs = tmp_path / "runs"
    whole = run_to_end([*arguments, "name=whole"], run_dir=runs / "whole", limit_s=_LIMIT_S)
    faults = [_TEACHER_GONE, _RANK_GONE]
    lossy = run_to_end([*arguments, "name=lossy"], run_dir=runs / "lossy", faults=faults, limit_s=_LIMIT_S)
    for outcome in (whole, lossy):
        _check_ended_well(outcome, num_steps=4)
    assert len(lossy.struck) == 2
    told = {row["kind"]: row["message"] for row in lossy.rows("events.jsonl")}
    assert told["worker_restarted"].startswith("teacher-0 was gone: it is started again in its place")
    assert told["workers_restarted"].startswith(
        "lost learner-1: all workers are started again in 0.1 s, from the checkpoint of update 2"
    )
    assert "all workers are started again" in " ".join(lossy.output.split())
    lines = lossy.rows("metrics.jsonl")
    assert [max(line.get(f"fault/{name}", 0) for line in lines) for name in ("restarted_workers", "restarts")] == [1, 1]
    assert lossy.weights == whole.weights != ""


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_starts_is_started_again(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(run: "subprocess.Popen[str]", run_dir: Path) -> None:
        if not killed and (run_dir / "logs" / "learner-0.log").exists():  # built in the rollout's and teacher's company
            process = worker_process(run, "learner-0")
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)

    outcome = run_to_end(
        overrides("fault.backoff_s=0.1"), run_dir=tmp_path / "runs" / "test", watch=kill, limit_s=_LIMIT_S
    )
    _check_ended_well(outcome, num_steps=2)
    assert "lost a worker at its start: all workers are started again in 0.1 s, from the start" in " ".join(
        outcome.output.split()
    )


@pytest.mark.slow
def test_calls_between_processes_that_fail_step_the_optimizer_no_second_time(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself drops some of its calls, before or after they have arrived."""
    arguments = overrides("num_steps=4", "deterministic=true", "eval_every=4")
    runs = tmp_path / "runs"
    whole = run_to_end([*arguments, "name=whole"], run_dir=runs / "whole", limit_s=_LIMIT_S)
    failing = {"num_failures": 2, "req_failure_prob": 2, "resp_failure_prob": 2}  # of each process; percent
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps({"CoreWorkerService.grpc_client.PushTask": failing}))
    flaky = run_to_end([*arguments, "name=flaky"], run_dir=runs / "flaky", limit_s=_LIMIT_S)
    for outcome in (whole, flaky):
        _check_ended_well(outcome, num_steps=4)
    assert flaky.weights == whole.weights != ""


@pytest.mark.slow
def test_a_run_that_goes_back_takes_other_prompts_and_remembers_so_when_it_is_restarted(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = overrides(
        "num_steps=6",
        "save_every=2",
        "deterministic=true",
        "eval_every=6",
        "fault.backoff_s=0.1",
        "learner.max_skipped_steps=0",
        "learner.on_skipped_steps=rollback",
    )
    runs = tmp_path / "runs"
    poison = At(step=3, phase=Phase.backward, role="learner", index=1, action=Action.not_finite)
    # Before and after the next checkpoint.
    kills = [At(step=step, phase=Phase.publish, role="learner", index=0, action=Action.sigkill) for step in (4, 5)]
    outcomes = {
        name: run_to_end([*arguments, f"name={name}"], run_dir=runs / name, faults=faults, limit_s=_LIMIT_S)
        for name, faults in {"whole": [], "back": [poison], "lossy": [poison, *kills]}.items()
    }
    for outcome in outcomes.values():
        _check_ended_well(outcome, num_steps=6)
    back, lossy = outcomes["back"], outcomes["lossy"]
    assert len(lossy.struck) == 3
    assert back.weights == lossy.weights != outcomes["whole"].weights
    told = {row["kind"]: row["message"] for row in back.rows("events.jsonl")}
    assert told["rolled_back"] == "going back: updates 3 to 4 take other prompts now"
    assert "update 4: gradients were not finite" in told["workers_restarted"]
    assert max(line.get("fault/rollbacks", 0) for line in back.rows("metrics.jsonl")) == 1
