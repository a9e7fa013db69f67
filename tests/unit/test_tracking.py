import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes import make_summary
from rich.console import Console

from opd_ray.console import StepLine
from opd_ray.protocol import Metrics
from opd_ray.state import RunDir
from opd_ray.tracking import RunTracker, Sink


@dataclass
class FakeSink:
    where: str = "nowhere"
    logged: list[tuple[int, Metrics]] = field(default_factory=list)
    finished: list[Metrics] = field(default_factory=list)

    def log(self, step: int, metrics: Metrics) -> None:
        self.logged.append((step, metrics))

    def finish(self, summary: Metrics) -> None:
        self.finished.append(summary)


def open_tracker(path: Path, *, step: int = 0, num_samples: int = 2, sinks: Sequence[Sink] = ()) -> RunTracker:
    line = StepLine(Console(file=io.StringIO()), name="train", num_steps=9, done=step)
    return RunTracker(RunDir(path=path), step=step, num_samples=num_samples, sinks=sinks, line=line)


def lines(path: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_metrics_get_one_line_a_step_with_the_key_step(tmp_path: Path):
    tracker = open_tracker(tmp_path)
    tracker.log(0, {"eval/accuracy": 0.5})
    tracker.log(1, {"train/loss": 2.0}, [make_summary(2, 4, rewards=[1, 0])])
    first, second = lines(tmp_path)
    assert first == {"step": 0, "eval/accuracy": 0.5}
    assert second["step"] == 1
    assert second["train/loss"] == 2.0
    assert second["rollout/accuracy"] == 0.5


def test_the_rates_of_a_step_come_from_its_samples_and_leave_out_the_time_of_evaluation(tmp_path: Path):
    tracker = open_tracker(tmp_path)
    tracker.log(1, {"time/eval_s": -9.5}, [make_summary(2, 4), make_summary(4)])  # as if 9.5 s more had been at hand
    (line,) = lines(tmp_path)
    assert 9.5 < line["time/step_s"] < 19
    assert line["perf/tokens_per_s"] * line["time/step_s"] == pytest.approx(10)


def test_a_step_without_samples_has_no_rates(tmp_path: Path):
    open_tracker(tmp_path).log(0, {"eval/accuracy": 0.5})
    assert not any(name.startswith(("perf/", "time/", "rollout/")) for name in lines(tmp_path)[0])


def test_only_the_first_few_samples_of_a_step_are_written(tmp_path: Path):
    tracker = open_tracker(tmp_path, num_samples=2)
    for step in (1, 2):
        tracker.log(step, {}, [make_summary(1, rewards=[1.0], text=f"{step}{letter}") for letter in "abc"])
    assert lines(tmp_path, "samples.jsonl") == [
        {"step": step, "text": f"{step}{letter}", "rewards": [1.0]} for step in (1, 2) for letter in "ab"
    ]


def test_a_sample_of_several_lines_takes_one_line(tmp_path: Path):
    open_tracker(tmp_path).log(1, {}, [make_summary(1, text='a\nb\u2028c\r"d')])
    (line,) = (tmp_path / "samples.jsonl").read_bytes().splitlines()
    assert json.loads(line)["text"] == 'a\nb\u2028c\r"d'


def test_without_samples_wanted_none_are_written(tmp_path: Path):
    open_tracker(tmp_path, num_samples=0).log(1, {}, [make_summary(1)])
    assert not (tmp_path / "samples.jsonl").exists()


def test_resuming_drops_the_lines_after_the_checkpoint_and_keeps_the_history_before(tmp_path: Path):
    before = open_tracker(tmp_path)
    for step in range(5):
        before.log(step, {"train/loss": float(step)}, [make_summary(1, text=f"sample {step}")])
    resumed = open_tracker(tmp_path, step=2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert [line["step"] for line in lines(tmp_path, "samples.jsonl")] == [0, 1, 2]
    assert [line["train/loss"] for line in resumed.history] == [0.0, 1.0, 2.0]
    resumed.log(3, {"train/loss": 30.0})
    assert [line["train/loss"] for line in lines(tmp_path)] == [0.0, 1.0, 2.0, 30.0]


def test_resuming_drops_what_was_quarantined_after_the_checkpoint(tmp_path: Path):
    file = RunDir(path=tmp_path).quarantine
    file.write_text("".join(json.dumps({"step": step, "reason": "NaN"}) + "\n" for step in (1, 2, 2, 3)))
    open_tracker(tmp_path, step=2)
    assert [line["step"] for line in lines(tmp_path, file.name)] == [1, 2, 2]


def test_a_step_is_held_once_it_is_recorded_in_this_process_or_before(tmp_path: Path):
    before = open_tracker(tmp_path)
    assert not before.holds(0)
    for step in range(3):
        before.log(step, {"train/loss": 1.0})
    assert before.holds(2)
    resumed = open_tracker(tmp_path, step=1)
    assert (resumed.holds(1), resumed.holds(2)) == (True, False)


def test_the_history_is_what_was_written(tmp_path: Path):
    tracker = open_tracker(tmp_path)
    tracker.log(0, {"eval/accuracy": 0.25})
    tracker.log(1, {"train/loss": 1.5}, [make_summary(3)])
    assert tracker.history == lines(tmp_path)


def test_a_value_that_is_not_finite_is_no_part_of_the_history(tmp_path: Path):
    tracker = open_tracker(tmp_path)
    tracker.log(1, {"train/loss": float("nan"), "train/lr": 0.5})
    assert tracker.history == [{"step": 1, "train/lr": 0.5}]


def test_the_summary_is_written_as_it_is_given(tmp_path: Path):
    open_tracker(tmp_path).finish({"wall_s": 1.5, "steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"wall_s": 1.5, "steps": 3}


def test_every_sink_gets_every_step_and_the_summary(tmp_path: Path):
    sinks = [FakeSink(), FakeSink()]
    tracker = open_tracker(tmp_path, sinks=sinks)
    tracker.log(0, {"eval/accuracy": 0.5})
    tracker.finish({"wall_s": 1.0})
    for sink in sinks:
        assert sink.logged == [(0, {"step": 0, "eval/accuracy": 0.5})]
        assert sink.finished == [{"wall_s": 1.0}]


def test_a_line_cut_short_by_a_crash_does_not_keep_a_run_from_resuming(tmp_path: Path):
    tracker = open_tracker(tmp_path)
    for step in range(3):
        tracker.log(step, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert [line["step"] for line in open_tracker(tmp_path, step=2).history] == [0, 1, 2]
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_run_resumed_at_step_zero_starts_its_files_anew(tmp_path: Path):
    open_tracker(tmp_path).log(0, {"eval/accuracy": 0.25})
    again = open_tracker(tmp_path, step=0)
    again.log(0, {"eval/accuracy": 0.25})
    assert [line["step"] for line in lines(tmp_path)] == [0]
    assert len(again.history) == 1


def test_the_samples_of_a_step_show_every_task_before_any_twice(tmp_path: Path):
    tracker = open_tracker(tmp_path, num_samples=3)
    batch = [make_summary(1, text=f"{task}{index}", task=task) for task in ("sort", "copy") for index in range(4)]
    tracker.log(1, {}, batch)
    assert [line["text"] for line in lines(tmp_path, "samples.jsonl")] == ["sort0", "copy0", "sort1"]


def test_what_was_measured_before_the_first_step_is_logged_with_it_and_no_other(tmp_path: Path):
    line = StepLine(Console(file=io.StringIO()), name="train", num_steps=9, done=0)
    gap = {"teacher/engine_gap_mean": 0.01, "teacher/engine_gap_relative": 0.02}
    tracker = RunTracker(RunDir(path=tmp_path), step=0, num_samples=2, sinks=(), line=line, measured=gap)
    tracker.log(0, {"eval/accuracy": 0.5})
    tracker.log(1, {"train/loss": 2.0})
    assert lines(tmp_path) == [{"step": 0, "eval/accuracy": 0.5, **gap}, {"step": 1, "train/loss": 2.0}]


def test_an_engine_mismatch_is_an_event_and_a_line_once(tmp_path: Path):
    screen = io.StringIO()
    line = StepLine(Console(file=screen, width=200), name="train", num_steps=9, done=0)
    tracker = RunTracker(RunDir(path=tmp_path), step=0, num_samples=2, sinks=(), line=line)
    for step, relative in enumerate((0.01, 0.4, 0.4)):
        tracker.log(step, {"rollout/logprob_gap_mean": 0.2, "rollout/logprob_gap_relative": relative})
    (event,) = lines(tmp_path, "events.jsonl")
    assert event["kind"] == "engine_mismatch"
    assert event["message"].startswith("step 1: rollout/logprob_gap_mean 0.2 nats a token is 40% of the OPD signal")
    assert screen.getvalue().count("warning: rollout/logprob_gap_mean") == 1
