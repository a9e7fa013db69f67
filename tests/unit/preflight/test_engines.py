import numpy as np
import pytest

from opd_ray.config.schema import Dtype
from opd_ray.preflight.engines import (
    Gap,
    engine_gap_metrics,
    gap,
    opd_signal,
    reference_gap,
    replicas,
    same_temperature,
    self_kl,
)
from opd_ray.preflight.finding import Status

RNG = np.random.default_rng(0)


def test_the_kl_of_a_gap_is_the_expectation_over_the_first_engines_tokens():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    tokens = RNG.choice(3, size=200_000, p=p)
    measured = gap(np.log(p)[tokens].astype(np.float32), np.log(q)[tokens].astype(np.float32))
    assert measured.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=0.03)
    assert measured.largest == pytest.approx(np.abs(np.log(q / p)).max(), rel=1e-5)


def test_a_kl_beyond_rounding_is_red_and_beyond_a_tenth_of_the_signal_yellow():
    def judge(kl: float, *, dtype: Dtype = Dtype.float32, signal: float = 1.0) -> Status:
        return self_kl(kl, dtypes=[Dtype.float32, dtype], signal=signal).status

    assert judge(1e-6) is Status.ok
    assert judge(2e-3) is Status.error
    assert judge(2e-3, dtype=Dtype.bfloat16) is Status.ok
    assert judge(2e-3, dtype=Dtype.bfloat16, signal=0.01) is Status.warning
    assert judge(float("nan")) is Status.error


def test_a_gap_is_shown_in_nats_and_relative_to_the_signal():
    finding = same_temperature(Gap(kl=0, mean=5e-4, largest=0.02), dtype=Dtype.float32, temperature=0.7, signal=0.05)
    assert finding.status is Status.ok
    assert "0.0005 nats in the mean and 0.02 at most, 1.00% of the OPD signal" in finding.found
    wrong = same_temperature(Gap(kl=0, mean=0.1, largest=0.2), dtype=Dtype.float32, temperature=0.7, signal=0.05)
    assert wrong.status is Status.error


def test_replicas_must_agree_more_closely_than_a_tenth_of_the_signal():
    first_N = np.zeros(8, dtype=np.float32)

    def judge(difference: float) -> Status:
        others = [first_N, first_N + np.float32(difference)]
        return replicas("teacher", [first_N, *others], dtype=Dtype.float32, signal=0.5).status

    assert judge(0.04) is Status.ok
    assert judge(0.06) is Status.error
    assert replicas("teacher", [first_N], dtype=Dtype.float32, signal=0.5).found == "one worker"


def test_a_signal_of_nothing_is_a_warning_and_none_at_all_an_error():
    assert opd_signal({"teacher": 0.4}).status is Status.ok
    assert opd_signal({"teachers.a": 0.4, "teachers.b": 1e-6}).status is Status.warning
    assert opd_signal({"teacher": float("inf")}).status is Status.error


def test_an_engine_that_costs_more_than_a_tenth_of_the_signal_is_yellow_and_one_that_costs_all_of_it_red():
    def judge(mean: float, *, signal: float = 0.5) -> Status:
        engine = Gap(kl=0, mean=mean, largest=mean)
        return reference_gap("teacher", engine, dtype=Dtype.float32, signal=signal).status

    assert judge(0.049) is Status.ok
    assert judge(0.051) is Status.warning
    assert judge(0.51) is Status.error
    assert judge(5e-4, signal=1e-4) is Status.ok  # student and teacher are one, and so is the engine
    assert judge(float("nan")) is Status.error


def test_the_engine_gap_of_a_run_is_that_of_its_worst_teacher_and_several_have_their_own():
    near, far = Gap(kl=0, mean=0.125, largest=1), Gap(kl=0, mean=0.25, largest=1)
    assert engine_gap_metrics({"teacher": (near, 0.5)}) == {
        "teacher/engine_gap_mean": 0.125,
        "teacher/engine_gap_relative": 0.25,
    }
    assert engine_gap_metrics({"a": (near, 0.5), "b": (far, 4.0)}) == {
        "teacher/engine_gap_mean": 0.25,
        "teacher/engine_gap_relative": 0.25,
        "teacher/engine_gap_mean_a": 0.125,
        "teacher/engine_gap_relative_a": 0.25,
        "teacher/engine_gap_mean_b": 0.25,
        "teacher/engine_gap_relative_b": 0.0625,
    }
