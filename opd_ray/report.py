"""Writes one HTML page of each run that is named, and one that compares them where there are several.

python -m opd_ray.report runs/demo
python -m opd_ray.report runs/demo-0 runs/demo-1 runs/demo-2 --output comparison.html
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opd_ray.pipeline_log import read_windows
from opd_ray.reporting.page import RunRecord, render
from opd_ray.reporting.side_by_side import render_comparison
from opd_ray.trace_log import FILE as TRACES_FILE

_PAGE = "report.html"
_NUM_WINDOWS, _NUM_EVENTS = 6, 20
_USER_ERROR = 2


def read_run(folder: Path) -> RunRecord:
    """Return what a run dir holds. Raises ValueError for a folder that is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; expected a run dir such as runs/demo")
    config_file = folder / "config.yaml"
    if not config_file.exists():
        raise ValueError(f"{folder} is no run dir: it has no config.yaml; expected one that opd_ray.train has written")
    text = config_file.read_text()
    config: Any = OmegaConf.create(text)
    history = [{k: v for k, v in line.items() if v is not None} for line in _lines(folder / "metrics.jsonl")]
    summary_file = folder / "summary.json"
    events = _lines(folder / "events.jsonl")
    evaluations = _lines(folder / TRACES_FILE)
    return RunRecord(
        name=str(OmegaConf.select(config, "name", default=folder.name)),
        config=text,
        headline=_headline(config),
        history=history,
        summary=json.loads(summary_file.read_text()) if summary_file.exists() else {},
        windows=read_windows(folder, last=_NUM_WINDOWS),
        hints=[event["message"] for event in events if event.get("kind") == "pools_badly_split"],
        events=events[-_NUM_EVENTS:],
        traces=evaluations[-1]["tasks"] if evaluations else {},
        traces_step=int(evaluations[-1]["step"]) if evaluations else 0,
    )


def write_report(folder: Path) -> Path:
    """Write the page of a run into its folder and return where it is. Raises ValueError, OSError."""
    target = folder / _PAGE
    target.write_text(render(read_run(folder)))
    return target


def write_comparison(folders: Sequence[Path], target: Path) -> Path:
    """Write the page that holds runs side by side and return where it is. Raises ValueError, OSError."""
    target.write_text(render_comparison([read_run(folder) for folder in folders]))
    return target


def _headline(config: Any) -> str:
    known = {
        "student": "student.path",
        "teacher": "teacher.path",
        "objective": "objective.kind",
        "steps": "num_steps",
        "staleness": "max_staleness",
    }
    values = {name: OmegaConf.select(config, key, default=None) for name, key in known.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; a last line that is cut short, of a run that goes on, is left out."""
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as fault:
        what = f"{path} holds a line that is no JSON ({fault.msg})"
        raise ValueError(f"{what}; expected a file that opd_ray.train has written") from None


def main() -> None:
    """Write the pages that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m opd_ray.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run dir, such as runs/demo")
    parser.add_argument("--output", type=Path, help="the page that compares runs (comparison.html beside the first)")
    options = parser.parse_args()
    try:
        for folder in options.runs:
            print(write_report(folder))
        if len(options.runs) > 1:
            print(write_comparison(options.runs, options.output or options.runs[0].parent / "comparison.html"))
    except (ValueError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        raise SystemExit(_USER_ERROR) from None


if __name__ == "__main__":
    main()
