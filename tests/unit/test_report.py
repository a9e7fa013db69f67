import json
import re
from pathlib import Path

import pytest

from opd_ray.pipeline import Span, Window
from opd_ray.report import main, pages, write_report
from opd_ray.reporting.charts import curves, ticks, timeline
from opd_ray.reporting.page import points_of

CONFIG = """name: "<b>bold</b>"
num_steps: 2
max_staleness: 1
student: {path: s}
teacher: {path: t}
objective: {kind: full}
"""
STEP = {"step": 1, "train/loss": 2.0, "distill/reverse_kl_full": 0.5, "perf/rollout_utilisation": 0.9, "x": None}
WINDOW = {"step": 1, "start": 100.0, "end": 102.0, "spans": [["rollout-0", "generate", 100.0, 101.5]]}


TRACES = {
    "step": 7,
    "tasks": {
        "sort": {
            "num_tokens": 9000,
            "metrics": {"reverse_kl": 0.5, "negative_reward_fraction": 0.333, "teacher_entropy": 0.25},
            "points": {
                "student": [0.5, 0.00001, 1.0],
                "teacher": [0.25, 0.5, 1.0],
                "position": [0, 1, 2],
                "token": ["<script>", " ", "b"],
            },
            "positions": [{"first": 0, "last": 1, "low": -1.0, "middle": 0.1, "high": 2.0}],
            "worst": [
                {
                    "token": "<script>",
                    "id": 1,
                    "count": 3,
                    "gap": -0.693,
                    "student": 0.5,
                    "teacher": 0.25,
                    "share": 2.08,
                }
            ],
            "traces": [
                {
                    "prompt": "<i>1+2=",
                    "tokens": ["<b>", "\n"],
                    "student": [-0.1, -2.0],
                    "teacher": [-3.2, -0.5],
                    "student_top": [[["<b>", -0.1], ["c", -3.0], ["e", -10.0]], [["\n", -2.0]]],
                    "teacher_top": [[["d", -0.01]], [["\n", -0.5]]],
                }
            ],
        }
    },
}


def run_dir(path: Path, *, metrics: str = json.dumps(STEP) + "\n", summary: bool = True) -> Path:
    (path / "config.yaml").write_text(CONFIG)
    (path / "metrics.jsonl").write_text(metrics)
    (path / "spans.jsonl").write_text(json.dumps(WINDOW) + "\n")
    hint = {"time": 1.0, "kind": "pools_badly_split", "message": "step 9: teacher is <idle>"}
    (path / "events.jsonl").write_text(json.dumps(hint) + "\n")
    (path / "traces.jsonl").write_text(json.dumps({**TRACES, "step": 5}) + "\n" + json.dumps(TRACES) + "\n")
    if summary:
        (path / "summary.json").write_text(json.dumps({"student_accuracy_after": 0.875}))
    return path


def test_a_page_shows_figures_curves_timeline_and_hint_and_escapes_what_a_run_wrote(tmp_path: Path):
    text = write_report(run_dir(tmp_path)).read_text()
    assert "0.875" in text
    assert "divergence in training (nats a token)" in text
    assert "rollout-0: generate 1.500 s, from 0.000 s" in text
    assert "<td>90% at work</td>" in text
    assert "teacher is &lt;idle&gt;" in text
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


def test_a_page_loads_nothing_from_anywhere(tmp_path: Path):
    text = write_report(run_dir(tmp_path)).read_text()
    assert re.findall(r"https?://|src=|<script|@import|url\(", text) == []


def test_a_page_shows_student_and_teacher_token_by_token_and_escapes_their_texts(tmp_path: Path):
    text = write_report(run_dir(tmp_path)).read_text()
    assert "Held-out samples of the student after update 7." in text
    assert "9,000 sampled tokens; of 33% of them the teacher thinks less than the student" in text
    assert "<tr><td>teacher's entropy, nats</td><td>0.25</td></tr>" in text
    assert "student's entropy, nats" not in text
    assert "<title>&lt;script&gt; at 0: student 0.5, teacher 0.25</title>" in text
    assert "<title>· at 1: student 1e-05, teacher 0.5</title>" in text
    assert "<code>&lt;script&gt;</code></td><td>3</td><td>-0.693</td><td>0.500</td><td>0.250</td><td>2.08</td>" in text
    assert '<span class="prompt">&lt;i&gt;1+2=</span>' in text
    assert '<span class="token below" style="--strength:75%" tabindex="0">&lt;b&gt;' in text
    assert '<span class="token above" style="--strength:38%" tabindex="0">⏎\n' in text
    assert "student 90.5%, teacher 4.1%" in text
    assert "teacher: <b>d</b> 99.0%" in text
    assert "<b>c</b> 5.0%, <b>e</b> 5e-05" in text


def test_a_run_of_several_tasks_has_a_curve_of_each_in_one_chart(tmp_path: Path):
    names = ("eval/reverse_kl", "eval/reverse_kl_sort", "eval/reverse_kl_copy")
    folder = run_dir(tmp_path, metrics=json.dumps({"step": 1, **dict.fromkeys(names, 0.5)}) + "\n")
    tasks = {"sort": TRACES["tasks"]["sort"], "copy": TRACES["tasks"]["sort"]}
    (folder / "traces.jsonl").write_text(json.dumps({"step": 1, "tasks": tasks}) + "\n")
    text = write_report(folder).read_text()
    for i, name in enumerate(("all tasks", "sort", "copy")):
        assert f'<i class="series s{i}"></i>{name}' in text
        assert text.count(f"<g><title>{name}</title>") == 1


def test_every_objective_has_its_estimate_in_the_same_chart():
    metrics = {"step": 1, "distill/signal": 1.0, "distill/support_teacher_mass": 0.9, "distill/jsd_support": 0.5}
    assert points_of([metrics], "distill/") == [(1, 0.5)]


def test_a_run_whose_teacher_compares_no_tokens_says_so(tmp_path: Path):
    folder = run_dir(tmp_path)
    (folder / "traces.jsonl").unlink()
    assert "No evaluation has compared student and teacher yet." in write_report(folder).read_text()


def other_run(path: Path, *, lr: str, name: str = "other") -> Path:
    path.mkdir()
    run_dir(path)
    (path / "config.yaml").write_text(CONFIG.replace('"<b>bold</b>"', name) + f"learner: {{lr: {lr}, zero_stage: 2}}\n")
    return path


def test_runs_side_by_side_share_charts_and_show_where_their_configurations_differ(tmp_path: Path):
    folders = [other_run(tmp_path / "a", lr="0.1"), other_run(tmp_path / "b", lr="0.2")]
    text = pages(folders)[tmp_path / "comparison.html"]
    assert '<i class="series s0"></i>other (1)' in text
    assert '<i class="series s1"></i>other (2)' in text
    assert "<tr><td>learner.lr</td><td>0.1</td><td>0.2</td></tr>" in text
    assert "learner.zero_stage" not in text
    assert text.count("<g><title>other (1)</title>") == text.count("<g><title>other (2)</title>") >= 2
    assert re.findall(r"https?://|src=|<script|@import|url\(", text) == []


def test_the_command_writes_each_page_and_one_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folders = [other_run(tmp_path / name, lr="0.1", name=name) for name in "ab"]
    monkeypatch.setattr("sys.argv", ["report", *map(str, folders)])
    main()
    pages = [folders[0] / "report.html", folders[1] / "report.html", tmp_path / "comparison.html"]
    assert capsys.readouterr().out.splitlines() == list(map(str, pages))
    assert all("<!doctype html>" in page.read_text() for page in pages)
    assert "Nowhere." not in pages[2].read_text()  # their names differ


def test_more_runs_than_colours_are_refused(tmp_path: Path):
    folders = [other_run(tmp_path / f"{i}", lr="0.1") for i in range(9)]
    with pytest.raises(ValueError, match="9 runs: expected at most 8"):
        pages(folders)


def test_a_page_goes_where_it_is_told_and_a_run_that_is_named_twice_is_one(tmp_path: Path):
    one, other = (other_run(tmp_path / name, lr="0.1", name=name) for name in "ab")
    assert list(pages([one], output=tmp_path / "page.html")) == [tmp_path / "page.html"]
    assert list(pages([one, one / ".." / "a"])) == [one / "report.html"]
    assert list(pages([one, other], output=tmp_path / "both.html"))[-1] == tmp_path / "both.html"


def test_nothing_is_written_where_one_of_the_folders_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = other_run(tmp_path / "a", lr="0.1")
    monkeypatch.setattr("sys.argv", ["report", str(folder), str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert not (folder / "report.html").exists()


def test_a_run_without_any_file_but_its_configuration_has_a_page(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    text = write_report(tmp_path).read_text()
    assert "staleness 1" in text
    assert "Nothing befell the run." in text


@pytest.mark.parametrize("metrics", ["", '{"step": 1, "train/lo'], ids=["no step yet", "the last line is cut short"])
def test_a_run_that_goes_on_has_a_page_too(tmp_path: Path, metrics: str):
    folder = run_dir(tmp_path, metrics=metrics, summary=False)
    for name in ("spans.jsonl", "traces.jsonl", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 9, "ta')
    text = write_report(folder).read_text()
    assert "Held-out samples of the student after update 7." in text
    assert "The run is not over: 0 steps are recorded." in text
    assert "No step is recorded yet." in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such folder; expected a run dir such as runs/demo"),
        ({}, "is no run dir: it has no config.yaml"),
        ({"config.yaml": "a: [1\nb: {"}, "is not the configuration of a run"),
        ({"config.yaml": "- a"}, "is not the configuration of a run"),
        ({"config.yaml": "model: x"}, "is not the configuration of a run"),
        ({"config.yaml": CONFIG, "metrics.jsonl": "no\n"}, "holds a line that is no JSON"),
        ({"config.yaml": CONFIG, "metrics.jsonl": "[1]\n"}, "holds something else than objects with step;"),
        ({"config.yaml": CONFIG, "spans.jsonl": '{"step": 1}\n'}, "objects with step, start, end, spans;"),
        ({"config.yaml": CONFIG, "events.jsonl": '"x"\n'}, "objects with time, kind, message;"),
        (
            {"config.yaml": CONFIG, "traces.jsonl": '{"step": 1, "tasks": {"a": 1}}\n'},
            "tasks without num_tokens, metrics, points",
        ),
        ({"config.yaml": CONFIG, "summary.json": '{"a"'}, "summary.json holds a line that is no JSON"),
    ],
    ids=[
        "missing",
        "foreign",
        "no yaml",
        "a list",
        "another tool's",
        "damaged",
        "no object",
        "spans",
        "events",
        "traces",
        "summary",
    ],
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
        (5, 5, [0, 2, 4, 6]),
        (1, 1, [0, 0.5, 1]),
        (-2, -2, [-2, -1.5, -1, -0.5, 0]),
        (0, 0, [0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose_what_is_shown(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == pytest.approx(expected)


def test_one_point_is_a_dot():
    assert "<circle" in curves("loss", {"": [(1, 2.0)]})


def test_lanes_are_in_the_order_of_the_pipeline():
    spans = [
        Span(lane=lane, phase="learn", start=0, end=1) for lane in ("learner", "teacher-0", "rollout-1", "rollout-0")
    ]
    svg = timeline([Window(step=1, start=0, end=1, spans=spans)])
    places = [svg.index(f">{lane}</text>") for lane in ("rollout-0", "rollout-1", "teacher-0", "learner")]
    assert places == sorted(places)
