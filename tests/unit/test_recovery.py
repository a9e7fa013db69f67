import pytest

from opd_ray.config.services import FaultConfig
from opd_ray.recovery import Restarts


class Lost(RuntimeError):
    pass


def restarts(**config: float) -> tuple[Restarts, list[tuple[str, str]], list[float]]:
    told: list[tuple[str, str]] = []
    slept: list[float] = []
    made = Restarts(
        config=FaultConfig(**config), warn=lambda words, kind: told.append((kind, words)), sleep=slept.append
    )
    return made, told, slept


def lose(made: Restarts, step: int) -> None:
    made.after(Lost("lost learner-1"), cause=OSError("the worker's own words"), step=step)


def test_restarts_without_a_new_checkpoint_wait_longer_and_are_limited():
    made, told, slept = restarts(max_restarts=3, backoff_s=2)
    for _ in range(3):
        lose(made, 4)
    with pytest.raises(OSError, match="own words"):
        lose(made, 4)
    assert slept == [2, 4, 8]
    assert made.total == 3
    assert {kind for kind, _ in told} == {"workers_restarted"}
    assert told[1][1] == (
        "lost learner-1: all workers are started again in 4 s, from the checkpoint of update 4 (restart 2 of at most 3"
        " in a row)"
    )


def test_a_new_checkpoint_starts_the_count_again():
    made, _, slept = restarts(max_restarts=1, backoff_s=1)
    for step in (0, 2, 4, 6):
        lose(made, step)
    assert slept == [1, 1, 1, 1]
    with pytest.raises(OSError, match="own words"):
        lose(made, 6)


def test_without_a_checkpoint_it_is_said_that_the_run_starts_again():
    made, told, _ = restarts()
    lose(made, 0)
    assert "from the start, there is no checkpoint" in told[0][1]


def test_no_restarts_means_that_the_first_loss_ends_the_run_with_its_own_cause():
    made, told, _ = restarts(max_restarts=0)
    with pytest.raises(OSError, match="own words"):
        lose(made, 4)
    assert told == []


@pytest.mark.parametrize(
    ("key", "value"), [("max_restarts", -1), ("backoff_s", -1.0), ("backoff_s", float("nan")), ("hang_timeout_s", 0.5)]
)
def test_a_wrong_setting_is_named(key: str, value: float):
    with pytest.raises(ValueError, match=f"fault.{key}={value}: expected"):
        FaultConfig(**{key: value})
