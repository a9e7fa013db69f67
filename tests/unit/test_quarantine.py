import json
from pathlib import Path

from fakes import make_summary

from opd_ray.quarantine import DiskQuarantine
from opd_ray.services import BadGroup
from opd_ray.state import RunDir

SUMMARY = make_summary(2, 3, text="1+1=\n2", task="sort", prompt_index=7)


def bad_group(*, step: int = 4, held_out: bool = False) -> BadGroup:
    return BadGroup(step=step, held_out=held_out, teacher="sort", seed=11, reason="it gave NaN", summary=SUMMARY)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_group_is_one_line_that_says_what_it_was_and_why(tmp_path: Path):
    quarantine = DiskQuarantine(RunDir(path=tmp_path), say=lambda _: None)
    quarantine.add(bad_group())
    quarantine.add(bad_group(step=2, held_out=True))
    first, second = lines(tmp_path / "quarantine.jsonl")
    assert quarantine.where == str(tmp_path / "quarantine.jsonl")
    assert first == {
        "step": 4,
        "held_out": False,
        "prompt_index": 7,
        "task": "sort",
        "teacher": "sort",
        "seed": 11,
        "version": 0,
        "reason": "it gave NaN",
        "text": "1+1=\n2",
    }
    assert (second["step"], second["held_out"]) == (2, True)


def test_every_group_is_an_event_and_the_first_one_is_said_with_the_place(tmp_path: Path):
    said: list[str] = []
    quarantine = DiskQuarantine(RunDir(path=tmp_path), say=said.append)
    for step in (4, 5, 6):
        quarantine.add(bad_group(step=step))
    events = lines(tmp_path / "events.jsonl")
    assert [event["kind"] for event in events] == ["bad_group"] * 3
    assert events[2]["message"] == "update 6, prompt 7: sort cannot score it: it gave NaN"
    (line,) = said
    assert line.startswith("warning: update 4, prompt 7: sort cannot score it: it gave NaN")
    assert quarantine.where in line


def test_a_warning_is_said_and_is_an_event(tmp_path: Path):
    said: list[str] = []
    DiskQuarantine(RunDir(path=tmp_path), say=said.append).warn("no KL")
    assert said == ["warning: no KL"]
    assert lines(tmp_path / "events.jsonl")[0]["message"] == "no KL"
