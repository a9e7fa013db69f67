import math

import pytest

from opd_ray.mismatch import MismatchWatch


def metrics(relative: float, *, name: str = "rollout/logprob_gap") -> dict[str, float]:
    return {f"{name}_mean": 0.04, f"{name}_relative": relative, "train/loss": 1.0}


def test_a_gap_of_a_tenth_of_the_signal_is_quiet_and_one_beyond_it_is_said():
    assert MismatchWatch().warnings(metrics(0.1)) == []
    (line,) = MismatchWatch().warnings(metrics(0.25))
    assert line.startswith("rollout/logprob_gap_mean 0.04 nats a token is 25% of the OPD signal, expected at most 10%;")
    assert "rollout.dtype" in line


def test_a_gap_is_said_once_and_again_when_it_is_ten_times_as_bad():
    watch = MismatchWatch()
    said = [bool(watch.warnings(metrics(relative))) for relative in (0.05, 0.2, 0.2, 0.05, 0.3, 1.9, 2.1, 3.0)]
    assert said == [False, True, False, False, False, False, True, False]


@pytest.mark.parametrize("relative", [math.inf, math.nan])
def test_a_gap_that_is_no_number_is_said_once(relative: float):
    watch = MismatchWatch()
    assert [len(watch.warnings(metrics(relative))) for _ in range(3)] == [1, 0, 0]


def test_the_teachers_gap_is_watched_apart_from_the_samplers():
    watch = MismatchWatch()
    assert watch.warnings(metrics(0.2))
    (line,) = watch.warnings(metrics(0.2) | metrics(0.5, name="teacher/engine_gap"))
    assert line.startswith("teacher/engine_gap_mean 0.04 nats a token is 50%")


def test_a_step_without_a_gap_says_nothing():
    assert MismatchWatch().warnings({"train/loss": 1.0}) == []
