"""One self-contained page of a run: figures, curves, who worked when, the configuration."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from opd_ray.pipeline import Window
from opd_ray.reporting.charts import curve, timeline

_CURVES = {
    "distill/reverse_kl": "reverse KL, training estimate (nats a token)",
    "eval/reverse_kl": "reverse KL, held out (nats a token)",
    "eval/accuracy": "accuracy, held out, greedy",
    "rollout/accuracy": "accuracy of rollouts",
    "train/grad_norm": "gradient norm",
    "rollout/logprob_gap_max": "largest log-prob gap, sampler to learner (nats)",
    "time/step_s": "step (s)",
    "perf/tokens_per_s": "response tokens a second",
}
_SUMMARY = {
    "student_accuracy_before": "student accuracy before",
    "student_accuracy_after": "student accuracy after",
    "teacher_accuracy": "teacher accuracy",
    "reverse_kl_before": "held-out reverse KL before",
    "reverse_kl_after": "held-out reverse KL after",
    "tokens_per_s": "response tokens a second",
    "step_s": "median step, s",
    "wall_s": "whole run, s",
}
_UTILISATION = ("rollout", "teacher", "learner")
_STYLE = """
:root{color-scheme:light dark;--fg:#1c1e21;--bg:#fff;--soft:#667;--line:#d8dbe0;--band:#f3f4f7;
--generate:#3b76c4;--score:#c9822b;--learn:#3f9a5f;--publish:#a1549b}
@media (prefers-color-scheme:dark){:root{--fg:#e4e6ea;--bg:#15171b;--soft:#9aa;--line:#363a42;--band:#1e2127;
--generate:#6ea3ea;--score:#e5a85c;--learn:#66c088;--publish:#cc86c6}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1060px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{margin:.3rem 0;color:var(--soft)}
table{border-collapse:collapse}td,th{padding:.2rem .9rem .2rem 0;text-align:left;font-weight:normal}
td:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}tr+tr td{border-top:1px solid var(--line)}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:1rem}
figure{margin:0}figcaption{color:var(--soft);font-size:.85rem}svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--line)}.curve{fill:none;stroke:var(--generate);
stroke-width:1.6}.dot{fill:var(--generate)}.window{fill:var(--band);stroke:var(--line)}.wide{overflow-x:auto}
.wide svg{min-width:700px}.generate{fill:var(--generate);background:var(--generate)}.score{fill:var(--score);
background:var(--score)}.learn{fill:var(--learn);background:var(--learn)}.publish{fill:var(--publish);
background:var(--publish)}.key{margin-right:1rem;color:var(--soft);font-size:.85rem}.key i{display:inline-block;
width:.8em;height:.8em;margin-right:.35em;border-radius:2px}pre{overflow-x:auto;background:var(--band);padding:1rem;
font-size:13px}.hint{border-left:3px solid var(--score);padding-left:.8rem;color:var(--fg)}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run dir says of its run; a run that is not over has no summary."""

    name: str
    config: str  # YAML
    headline: str
    history: Sequence[Mapping[str, float]]
    summary: Mapping[str, float]
    windows: Sequence[Window]  # the newest
    hints: Sequence[str]


def render(run: RunRecord) -> str:
    """Return the page as HTML text; everything a run wrote is escaped."""
    sections = [
        f"<h1>{escape(run.name)}</h1><p>{escape(run.headline)}</p>",
        _section("Result", _figures(run)),
        _section("Curves", _curves(run.history)),
        _section("Who works when", _pipeline(run)),
        f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run.name)} - opd-ray</title><style>{_STYLE}</style>"
    )
    body = "".join(sections)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}"


def _figures(run: RunRecord) -> str:
    if not run.summary:
        steps = max((int(m["step"]) for m in run.history), default=0)
        return f"<p>The run is not over: {steps} steps are recorded.</p>"
    return _table([(words, f"{run.summary[key]:,.4g}") for key, words in _SUMMARY.items() if key in run.summary])


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    figures = []
    for key, title in _CURVES.items():
        name = next((n for m in history for n in m if n == key or n.startswith(f"{key}_")), key)
        points = [(m["step"], m[name]) for m in history if name in m]
        if points:
            figures.append(curve(title, points))
    return f'<div class="grid2">{"".join(figures)}</div>' if figures else "<p>No step is recorded yet.</p>"


def _pipeline(run: RunRecord) -> str:
    if not run.windows:
        return "<p>No timeline is recorded yet.</p>"
    rows = []
    for pool in _UTILISATION:
        values = [m[f"perf/{pool}_utilisation"] for m in run.history if f"perf/{pool}_utilisation" in m]
        if values:
            rows.append((pool, f"{statistics.median(values):.0%} at work"))
    hints = "".join(f'<p class="hint">{escape(hint)}</p>' for hint in run.hints)
    steps = f"the last {len(run.windows)} steps" if len(run.windows) > 1 else "the last step"
    return f"{_table(rows)}{hints}<p>{steps.capitalize()}; evaluation is left out.</p>{timeline(run.windows)}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"
