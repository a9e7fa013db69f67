import json
import re
from pathlib import Path

import pytest

from opd_ray.pipeline import Span, Window
from opd_ray.report import main, write_report
from opd_ray.reporting.charts import curve, ticks, timeline

CONFIG = """name: "<b>bold</b>"
num_steps: 2
max_staleness: 1
student: {path: s}
teacher: {path: t}
objective: {kind: full}
"""
STEP = {"step": 1, "train/loss": 2.0, "distill/reverse_kl_full": 0.5, "perf/rollout_utilisation": 0.9, "x": None}
WINDOW = {"step": 1, "start": 100.0, "end": 102.0, "spans": [["rollout-0", "generate", 100.0, 101.5]]}


def run_dir(path: Path, *, metrics: str = json.dumps(STEP) + "\n", summary: bool = True) -> Path:
    (path / "config.yaml").write_text(CONFIG)
    (path / "metrics.jsonl").write_text(metrics)
    (path / "spans.jsonl").write_text(json.dumps(WINDOW) + "\n")
    hint = {"time": 1.0, "kind": "pools_badly_split", "message": "step 9: teacher is <idle>"}
    (path / "events.jsonl").write_text(json.dumps(hint) + "\n")
    if summary:
        (path / "summary.json").write_text(json.dumps({"student_accuracy_after": 0.875}))
    return path


def test_a_page_shows_figures_curves_timeline_and_hint_and_escapes_what_a_run_wrote(tmp_path: Path):
    text = write_report(run_dir(tmp_path)).read_text()
    assert "0.875" in text
    assert "reverse KL, training estimate" in text
    assert "rollout-0: generate 1.500 s, from 0.000 s" in text
    assert "<td>90% at work</td>" in text
    assert "teacher is &lt;idle&gt;" in text
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


def test_a_page_loads_nothing_from_anywhere(tmp_path: Path):
    text = write_report(run_dir(tmp_path)).read_text()
    assert re.findall(r"https?://|src=|<script|@import|url\(", text) == []


@pytest.mark.parametrize("metrics", ["", '{"step": 1, "train/lo'], ids=["no step yet", "the last line is cut short"])
def test_a_run_that_goes_on_has_a_page_too(tmp_path: Path, metrics: str):
    text = write_report(run_dir(tmp_path, metrics=metrics, summary=False)).read_text()
    assert "The run is not over: 0 steps are recorded." in text
    assert "No step is recorded yet." in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such folder; expected a run dir such as runs/demo"),
        ({}, "is no run dir: it has no config.yaml"),
        ({"config.yaml": CONFIG, "metrics.jsonl": "no\n"}, "holds a line that is no JSON"),
    ],
    ids=["missing", "foreign", "damaged"],
)
def test_a_folder_that_is_no_run_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str] | None,
    message: str,
):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert message in written.err
    assert len(written.err.splitlines()) == 1
    assert written.out == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 100, [0, 50, 100]),
        (3.2, 7.9, [2, 4, 6, 8]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (5, 5, [4, 6]),
        (0, 0, [0, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_what_is_shown(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == pytest.approx(expected)


def test_one_point_is_a_dot():
    assert "<circle" in curve("loss", [(1, 2.0)])


def test_lanes_are_in_the_order_of_the_pipeline():
    spans = [
        Span(lane=lane, phase="learn", start=0, end=1) for lane in ("learner", "teacher-0", "rollout-1", "rollout-0")
    ]
    svg = timeline([Window(step=1, start=0, end=1, spans=spans)])
    places = [svg.index(f">{lane}</text>") for lane in ("rollout-0", "rollout-1", "teacher-0", "learner")]
    assert places == sorted(places)
