"""One page of several runs: their figures, their curves in one chart each, where their configurations differ."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from opd_ray.reporting.charts import NUM_COLOURS, legend
from opd_ray.reporting.page import SUMMARY, RunRecord, chart_groups, points_of
from opd_ray.reporting.style import page


def render_comparison(runs: Sequence[RunRecord]) -> str:
    """Return the page as HTML text. Raises ValueError for more runs than there are colours."""
    if len(runs) > NUM_COLOURS:
        raise ValueError(f"{len(runs)} runs: expected at most {NUM_COLOURS} on one page, one colour each")
    names = _distinct([run.name for run in runs])
    by_name = dict(zip(names, runs, strict=True))
    curves = chart_groups(lambda key: {name: points_of(run.history, key) for name, run in by_name.items()})
    body = (
        f"<h1>{len(runs)} runs</h1>{legend(names)}<h2>Results</h2>{_results(runs, names)}"
        f"<h2>Curves</h2>{curves or '<p>No step is recorded yet.</p>'}"
        f"<h2>Where the configurations differ</h2>{_differences(runs, names)}"
    )
    return page(", ".join(names), body)


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that are not alone with their number."""
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _results(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    rows = []
    for key, words in SUMMARY.items():
        if any(key in run.summary for run in runs):
            rows.append((words, [f"{run.summary[key]:,.4g}" if key in run.summary else "-" for run in runs]))
    unfinished = [name for run, name in zip(runs, names, strict=True) if not run.summary]
    note = f"<p>Not over: {escape(', '.join(unfinished))}.</p>" if unfinished else ""
    return note + _table(rows, names, css="")


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    flat = [_flat(yaml.safe_load(run.config) or {}) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, "-") for config in flat]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    return _table(differing, names, css="texts") if differing else "<p>Nowhere.</p>"


def _flat(block: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(block, Mapping):
        return {prefix.removesuffix("."): str(block)}
    return {k: v for key, value in block.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _table(rows: Sequence[tuple[str, Sequence[str]]], names: Sequence[str], *, css: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{escape(words)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for words, values in rows
    )
    return f'<div class="wide"><table class="{css}"><tr><th></th>{head}</tr>{body}</table></div>'
