"""Reads what a run dir says of its run; says in one sentence what is wrong with a folder that is none."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from opd_ray.pipeline_log import FILE as SPANS_FILE
from opd_ray.pipeline_log import read_windows
from opd_ray.reporting.page import RunRecord
from opd_ray.trace_log import FILE as TRACES_FILE

_NUM_WINDOWS, _NUM_EVENTS = 6, 20
_OF_A_TASK = ("num_tokens", "metrics", "points", "positions", "worst", "traces")
_WRITTEN_BY = "expected a file that opd_ray.train has written"
_HEADLINE = {
    "student": "student.path",
    "teacher": "teacher.path",
    "objective": "objective.kind",
    "steps": "num_steps",
    "staleness": "max_staleness",
}


def read_run(folder: Path) -> RunRecord:
    """Return what a run dir holds. Raises ValueError for a folder that is none, or whose files are damaged."""
    text, config = _config(folder)
    history = _lines(folder / "metrics.jsonl", "step")
    events = _lines(folder / "events.jsonl", "time", "kind", "message")
    _lines(folder / SPANS_FILE, "step", "start", "end", "spans", last=_NUM_WINDOWS)
    newest = _newest_evaluation(folder / TRACES_FILE)
    return RunRecord(
        name=str(config.get("name", folder.name)),
        config=text,
        headline=", ".join(
            f"{word} {_at(config, key)}" for word, key in _HEADLINE.items() if _at(config, key) is not None
        ),
        history=[{k: v for k, v in line.items() if v is not None} for line in history],
        summary=_summary(folder / "summary.json"),
        windows=read_windows(folder, last=_NUM_WINDOWS),
        hints=[event["message"] for event in events if event["kind"] == "pools_badly_split"],
        events=events[-_NUM_EVENTS:],
        traces=newest["tasks"],
        traces_step=int(newest["step"]),
    )


def _config(folder: Path) -> tuple[str, Mapping[str, Any]]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise ValueError(f"{folder}: {what}; expected a run dir such as runs/demo")
    path = folder / "config.yaml"
    if not path.exists():
        raise ValueError(f"{folder} is no run dir: it has no config.yaml; expected one that opd_ray.train has written")
    text = _text(path)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, Mapping) or "student" not in config:
        raise ValueError(f"{path} is not the configuration of a run; {_WRITTEN_BY}")
    return text, config


def _newest_evaluation(path: Path) -> dict[str, Any]:
    """Return the last line of traces.jsonl; of a run without any, no task."""
    lines = _lines(path, "step", "tasks", last=1)
    if not lines:
        return {"step": 0, "tasks": {}}
    tasks = lines[0]["tasks"]
    if not isinstance(tasks, Mapping) or not all(_has(of_task, _OF_A_TASK) for of_task in tasks.values()):
        raise ValueError(f"{path} holds tasks without {', '.join(_OF_A_TASK)}; {_WRITTEN_BY}")
    return lines[0]


def _summary(path: Path) -> Mapping[str, float]:
    return _object(path, _text(path)) if path.exists() else {}


def _lines(path: Path, *keys: str, last: int = 0) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, the newest `last` of them if that is given.

    A last line that is cut short, of a run that goes on, is left out. Raises ValueError for anything but objects that
    have the keys.
    """
    whole = _text(path).split("\n")[:-1] if path.exists() else []
    return [_object(path, line, *keys) for line in whole[-last:]]


def _object(path: Path, text: str, *keys: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path} holds a line that is no JSON ({fault.msg}); {_WRITTEN_BY}") from None
    if not isinstance(found, dict) or not _has(found, keys):
        raise ValueError(f"{path} holds something else than objects with {', '.join(keys) or 'names'}; {_WRITTEN_BY}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{path} holds no text; {_WRITTEN_BY}") from None


def _has(found: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(found, Mapping) and all(key in found for key in keys)


def _at(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
