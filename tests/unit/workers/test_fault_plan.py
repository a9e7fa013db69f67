import math
import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from workers.fault_plan import PLAN, Action, At, Phase, reach, struck, write_plan
from workers.lane import LANE

HERE = At(step=3, phase=Phase.publish, role="learner", index=1, action=Action.disk_full)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "plan.json"
    monkeypatch.setenv(PLAN, str(path))
    monkeypatch.setenv(LANE, "learner-1")
    return path


def test_a_fault_strikes_at_its_place_and_once(plan: Path):
    write_plan(plan, [HERE])
    reach(Phase.publish, step=2)
    reach(Phase.save, step=3)
    assert struck(plan) == []
    with pytest.raises(OSError, match="No space left"):
        reach(Phase.publish, step=3)
    assert struck(plan) == ["learner-1-publish-3-disk_full"]
    reach(Phase.publish, step=3)


def test_another_worker_and_a_run_without_a_plan_go_on(plan: Path, monkeypatch: pytest.MonkeyPatch):
    write_plan(plan, [HERE])
    monkeypatch.setenv(LANE, "learner-0")
    reach(Phase.publish, step=3)
    monkeypatch.setenv(LANE, "learner-1")
    monkeypatch.delenv(PLAN)
    reach(Phase.publish, step=3)
    assert struck(plan) == []


def test_numbers_become_nan_once_as_planned(plan: Path):
    write_plan(plan, [replace(HERE, phase=Phase.backward, action=Action.not_finite)])
    factors = [reach(Phase.backward, step=step) for step in (2, 3, 3)]
    assert [math.isnan(factor) for factor in factors] == [False, True, False]


def test_a_killed_process_has_left_its_mark(plan: Path):
    write_plan(plan, [At(step=1, phase=Phase.score, role="learner", index=1, action=Action.sigkill)])
    process = multiprocessing.get_context("fork").Process(target=reach, args=(Phase.score,), kwargs={"step": 1})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert struck(plan) == ["learner-1-score-1-sigkill"]
