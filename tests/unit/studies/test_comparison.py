"""The comparison's figures from the files that runs leave, without running any."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from opd_ray.studies.comparison import OBJECTIVES, Curve, by_objective, draw, main, read_curve, table


def curve(objective: str, seed: int, *, last: float) -> Curve:
    return Curve(
        objective=objective, seed=seed, steps=[0, 5], accuracy=[0.25, last], reverse_kl=[1.5, 1 - last], step_s=0.5
    )


def test_a_curve_holds_the_evaluated_steps_of_a_run(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "eval/reverse_kl": 1.5, "eval/accuracy": 0.25},
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.9, "eval/reverse_kl": 0.75, "eval/accuracy": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"step_s": 0.5}))
    assert read_curve(tmp_path, objective="full", seed=3) == Curve(
        objective="full", seed=3, steps=[0, 2], accuracy=[0.25, 0.5], reverse_kl=[1.5, 0.75], step_s=0.5
    )


def test_the_table_shows_means_over_seeds_and_each_seeds_end() -> None:
    ends = {("sampled", 0): 0.4, ("sampled", 1): 0.6, ("full", 0): 0.8, ("full", 1): 0.9}
    curves = [curve(objective, seed, last=last) for (objective, seed), last in ends.items()]
    assert list(by_objective(curves)) == ["sampled", "full"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(curves))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["0", "25.0%", "1.500", "25.0%", "1.500"] in rows
    assert ["5", "50.0%", "0.500", "85.0%", "0.150"] in rows
    assert ["end,", "seed", "1", "60.0%", "0.400", "90.0%", "0.100"] in rows


def test_the_figure_is_a_file(tmp_path: Path) -> None:
    draw([curve(name, seed, last=0.5 + seed / 10) for name in OBJECTIVES for seed in range(2)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--seeds", "--steps"])
def test_a_count_below_one_is_one_line(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["comparison", flag, "0"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {flag} 0: expected at least 1\n"
