"""What is kept of a comparison, held against arithmetic by hand; and how parts of it are put together."""

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import make_comparison

from opd_ray.comparison import Comparison, TokenPoints, TokenTrace, joined
from opd_ray.json_lines import JsonLines
from opd_ray.trace_log import FILE, add_traces, trace_rows


def lines_in(folder: Path) -> JsonLines:
    return JsonLines(folder, warn=pytest.fail)


TRACE = TokenTrace(
    prompt="1+2=", tokens=("1", "2"), student_logprobs=(-0.1, -2.0), teacher_logprobs=(-1.1, -0.5),
    student_top=((("1", -0.1),), (("2", -2.0),)), teacher_top=((("2", -0.2),), (("2", -0.5),)),
)  # fmt: skip


def comparison(
    *, student: list[float], teacher: list[float], ids: list[int], weights: list[float] | None = None, **given: object
) -> Comparison:
    points = TokenPoints(
        ids_M=np.array(ids, dtype=np.int32),
        positions_M=np.arange(len(ids), dtype=np.int32),
        student_logprobs_M=np.log(np.array(student, dtype=np.float32)),
        teacher_logprobs_M=np.log(np.array(teacher, dtype=np.float32)),
        weights_M=np.array(weights or [1.0] * len(ids), dtype=np.float32),
    )
    texts = {i: f"t{i}" for i in ids}
    fields = {"kl_sum": 2.0, "num_tokens": len(ids), "sums": {}, "points": points, "token_texts": texts, "traces": ()}
    return Comparison(**{**fields, **given})


def test_means_are_over_all_tokens_and_quantiles_over_the_points():
    compared = comparison(
        student=[0.5, 0.5, 0.5], teacher=[0.5, 0.25, 1.0], ids=[1, 1, 2], num_tokens=10, sums={"student_entropy": 5.0}
    )
    metrics = compared.metrics()
    assert metrics["student_entropy"] == 0.5
    assert metrics["logprob_gap_p50"] == pytest.approx(0.0)
    assert metrics["logprob_gap_p10"] == pytest.approx(np.log(0.5), rel=1e-5)
    assert metrics["logprob_gap_p90"] == pytest.approx(np.log(2), rel=1e-5)
    assert compared.kl == 0.2


def test_a_point_counts_as_often_as_there_are_tokens_that_it_stands_for():
    many = comparison(student=[0.8, 0.8], teacher=[0.4, 0.4], ids=[1, 1], weights=[10.0, 10.0])
    few = comparison(student=[0.5] * 6, teacher=[0.5] * 6, ids=[1] * 6)
    metrics = joined([few, many]).metrics()
    assert metrics["logprob_gap_p10"] == metrics["logprob_gap_p50"] == pytest.approx(np.log(0.5), rel=1e-5)
    assert metrics["logprob_gap_p90"] == 0


def test_parts_are_put_together_by_their_tokens():
    one = comparison(student=[0.5], teacher=[0.5], ids=[1], sums={"a": 1.0}, traces=(TRACE,))
    two = comparison(student=[0.1, 0.2], teacher=[0.3, 0.4], ids=[2, 3], sums={"a": 3.0, "b": 1.0})
    whole = joined([one, two])
    assert (whole.kl_sum, whole.num_tokens, whole.sums) == (4.0, 3, {"a": 4.0, "b": 1.0})
    assert whole.points.ids_M.tolist() == [1, 2, 3]
    assert whole.token_texts == {1: "t1", 2: "t2", 3: "t3"}
    assert whole.traces == (TRACE,)


def test_the_worst_tokens_are_those_with_the_largest_sum_of_gaps(tmp_path: Path):
    compared = comparison(student=[0.8, 0.8, 0.9, 0.1], teacher=[0.2, 0.4, 0.3, 0.9], ids=[5, 5, 6, 7], traces=(TRACE,))
    add_traces(lines_in(tmp_path), 3, {"sort": compared})
    (line,) = (json.loads(text) for text in (tmp_path / FILE).read_text().splitlines())
    assert line["step"] == 3
    told = line["tasks"]["sort"]
    assert [row["token"] for row in told["worst"]] == ["t5", "t6", "t7"]
    first = told["worst"][0]
    assert first["share"] == pytest.approx(np.log(0.8 / 0.2) + np.log(0.8 / 0.4), rel=1e-4)
    assert (first["count"], first["student"], first["teacher"]) == (2, pytest.approx(0.8), pytest.approx(0.3))
    assert told["points"]["student"] == pytest.approx([0.8, 0.8, 0.9, 0.1], abs=1e-5)
    assert told["traces"][0]["tokens"] == ["1", "2"]
    assert (told["num_tokens"], told["metrics"]["reverse_kl"]) == (4, 0.5)
    assert told["metrics"]["logprob_gap_p50"] == pytest.approx(np.log(0.3 / 0.9), rel=1e-4)


def test_gaps_by_position_are_quantiles_of_the_tokens_there(tmp_path: Path):
    generator = np.random.default_rng(0)
    student, teacher = generator.uniform(0.1, 1, 240), generator.uniform(0.1, 1, 240)
    add_traces(
        JsonLines(tmp_path, warn=print),
        1,
        {"sort": comparison(student=list(student), teacher=list(teacher), ids=[1] * 240)},
    )
    bins = json.loads((tmp_path / FILE).read_text())["tasks"]["sort"]["positions"]
    assert bins[0]["first"] == 0
    assert bins[-1]["last"] == 239
    assert [b["first"] for b in bins[1:]] == [b["last"] + 1 for b in bins[:-1]]
    rewards = np.log(teacher) - np.log(student)
    for b in bins:
        expected = np.quantile(rewards[b["first"] : b["last"] + 1], [0.1, 0.5, 0.9], method="inverted_cdf")
        assert [b["low"], b["middle"], b["high"]] == pytest.approx(list(expected), abs=1e-5)


def test_one_token_and_none_are_kept_as_well(tmp_path: Path):
    add_traces(lines_in(tmp_path), 1, {"sort": comparison(student=[0.5], teacher=[0.5], ids=[1])})
    add_traces(lines_in(tmp_path), 2, {"sort": make_comparison(kl_sum=1.0, num_tokens=1)})
    one, none = (json.loads(text)["tasks"]["sort"] for text in (tmp_path / FILE).read_text().splitlines())
    assert [(b["first"], b["last"]) for b in one["positions"]] == [(0, 0)]
    assert (none["positions"], none["worst"]) == ([], [])


def test_a_traced_response_is_a_row_with_the_signal_of_each_token():
    (row,) = trace_rows(4, {"sort": comparison(student=[0.5], teacher=[0.5], ids=[1], traces=(TRACE,))})
    assert (row.step, row.text, row.signal) == (4, "1+2=12", "1(-1.00) 2(+1.50)")
