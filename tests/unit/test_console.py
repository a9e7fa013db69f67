import io
import re

import pytest
from rich.console import Console

from opd_ray.console import RunConsole, StepLine, step_breakdown, step_numbers


def on_paper() -> tuple[RunConsole, io.StringIO]:
    """Return a console whose output is no terminal, as in a log file, and what it writes."""
    text = io.StringIO()
    return RunConsole(Console(file=text, highlight=False, soft_wrap=True)), text


def on_terminal() -> tuple[RunConsole, io.StringIO]:
    text = io.StringIO()
    return RunConsole(Console(file=text, force_terminal=True, width=120)), text


def test_a_phase_off_the_terminal_prints_one_line_with_its_seconds():
    console, text = on_paper()
    with console.phase("start workers"):
        pass
    assert re.fullmatch(r"start workers: \d+\.\d s\n", text.getvalue())


def test_the_seconds_of_a_phase_that_comes_twice_add_up():
    console, _ = on_paper()
    with console.phase("evaluate"):
        pass
    once = console.phase_seconds["evaluate"]
    with console.phase("evaluate"):
        pass
    assert list(console.phase_seconds) == ["evaluate"]
    assert console.phase_seconds["evaluate"] > once


def test_steps_off_the_terminal_print_one_plain_line_each():
    console, text = on_paper()
    with console.progress_phase("train", num_steps=2) as line:
        line.show_step(1, {"train/loss": 0.5})
        line.show_step(2, {"train/loss": 0.25})
    first, second, end = text.getvalue().splitlines()
    assert first.startswith("train 1/2  loss 0.5000  left 0:0")
    assert second.startswith("train 2/2  loss 0.2500  left 0:00")
    assert end.startswith("train: ")
    assert "\x1b" not in text.getvalue()


def test_the_time_left_is_not_guessed_before_a_step_is_done():
    console, text = on_paper()
    with console.progress_phase("train", num_steps=9, done=4) as line:
        line.show_step(4, {"eval/accuracy": 0.5})
    assert text.getvalue().splitlines()[0] == "train 4/9  eval acc 0.500"


def test_supervised_steps_off_the_terminal_print_now_and_then_and_at_the_end():
    console, text = on_paper()
    with console.progress_phase("build student", num_steps=120) as line:
        for step in range(1, 121):
            line.show_loss(step, 1.0)
    shown = [row.split()[2] for row in text.getvalue().splitlines() if row.startswith("build student ")]
    assert shown == ["50/120", "100/120", "120/120"]


def test_text_with_square_brackets_is_printed_as_it_is():
    console, text = on_paper()
    console.say("a [bold]word[/bold] and [x]")
    assert text.getvalue() == "a [bold]word[/bold] and [x]\n"


def test_a_long_line_is_not_broken_off_the_terminal():
    console, text = on_paper()
    console.say("word " * 100)
    assert text.getvalue().count("\n") == 1


def test_a_terminal_gets_a_bar_instead_of_lines():
    console, text = on_terminal()
    with console.progress_phase("train", num_steps=2) as line:
        line.show_step(1, {"train/loss": 0.5})
        line.show_step(2, {"train/loss": 0.25})
    assert "2/2" in text.getvalue()
    assert "loss 0.2500" in text.getvalue()
    assert "train 1/2" not in text.getvalue()


def test_a_bar_ends_when_the_phase_fails():
    console, _ = on_terminal()

    def fail() -> None:
        with console.progress_phase("train", num_steps=2):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    with console.phase("again"):  # rich refuses a second live display while one is on
        pass


def test_the_table_shows_names_and_values():
    console, text = on_paper()
    console.table("Result", [("steps", "12"), ("[odd]", "x")])
    assert "Result" in text.getvalue()
    assert "steps" in text.getvalue()
    assert "12" in text.getvalue()


def test_the_numbers_of_a_step_are_those_it_has_and_no_others():
    assert step_numbers({}) == ""
    assert step_numbers({"train/loss": 1.23456, "other/thing": 5}) == "loss 1.2346"
    everything = {
        "perf/tokens_per_s": 12345.6,
        "time/step_s": 2.5,
        "distill/reverse_kl_support": 0.5,
        "eval/reverse_kl": 0.25,
        "eval/accuracy": 0.5,
        "rollout/accuracy": 0.75,
        "rollout/logprob_gap_max": 0.00012,
        "train/loss": 1.0,
    }
    assert (
        step_numbers(everything)
        == "loss 1.0000  kl 0.5000  acc 0.75  eval acc 0.500  eval kl 0.2500  gap 1e-04  12,346 tok/s  2.50 s"
    )


def test_the_breakdown_gives_medians_of_the_step_and_its_parts():
    parts = ("wait_rollout", "wait_teacher", "update", "publish")
    history = [{"step": 0.0}] + [
        {"time/step_s": 4.0 * t, **{f"time/{part}_s": float(t) for part in parts}} for t in (1, 2, 30)
    ]
    rows = step_breakdown(history)
    assert rows[0] == ("median step", "8.000 s")
    assert [value for _, value in rows[1:]] == ["2.000 s"] * 4
    assert step_breakdown([{"step": 0.0}]) == []


def test_the_time_left_is_written_in_minutes_and_seconds():
    text = io.StringIO()
    line = StepLine(Console(file=text), name="train", num_steps=10**9, done=0)
    line.show_step(1, {})
    minutes, seconds = text.getvalue().split()[-1].split(":")
    assert int(minutes) >= 0
    assert len(seconds) == 2
