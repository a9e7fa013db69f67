"""One self-contained page of a run: figures, curves, who worked when, the configuration."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from opd_ray.pipeline import Window
from opd_ray.reporting.charts import NUM_COLOURS, Points, curves, legend, timeline
from opd_ray.reporting.style import page
from opd_ray.reporting.tokens import tokens_sections

CURVES = {
    "Distillation": {
        "distill/": "divergence in training (nats a token)",
        "eval/reverse_kl": "reverse KL, held out (nats a token)",
        "eval/negative_reward_fraction": "share of tokens with a negative reward, held out",
        "eval/student_entropy": "student's entropy, held out (nats)",
        "eval/teacher_entropy": "teacher's entropy on the same prefixes (nats)",
        "eval/topk_overlap": "overlap of the 16 likeliest tokens",
        "eval/student_mass_in_teacher_topk": "student's mass in the teacher's top 16",
        "eval/teacher_mass_in_student_topk": "teacher's mass in the student's top 16",
        "distill/support_teacher_mass": "teacher's mass in the support",
        "distill/support_student_mass": "student's mass in the support",
    },
    "Responses": {
        "eval/accuracy": "accuracy, held out, greedy",
        "rollout/accuracy": "accuracy of rollouts",
        "rollout/response_tokens_mean": "response tokens, mean",
        "rollout/truncated_fraction": "truncated responses",
        "rollout/repetition": "repeated 4-grams, share of a response",
    },
    "Optimisation": {
        "train/loss": "loss",
        "train/grad_norm": "gradient norm",
        "train/gradient_noise": "gradient noise: variance / squared mean",
        "train/lr": "learning rate",
        "train/negative_reward_fraction": "share of trained tokens with a negative reward",
        "train/ess_fraction": "effective sample size, share of the tokens",
        "train/token_age_mean": "age of tokens, mean (versions)",
        "rollout/logprob_gap_max": "largest log-prob gap, sampler to learner (nats)",
    },
    "Time": {
        "time/step_s": "step (s)",
        "perf/tokens_per_s": "response tokens a second",
    },
}
SUMMARY = {
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
    events: Sequence[Mapping[str, Any]]  # the newest, of every kind
    traces: Mapping[str, Any]  # of the newest evaluation, by task
    traces_step: int


def render(run: RunRecord) -> str:
    """Return the page as HTML text; everything a run wrote is escaped."""
    sections = [
        f"<h1>{escape(run.name)}</h1><p>{escape(run.headline)}</p>",
        _section("Result", _figures(run)),
        _section("Curves", _curves(run)),
        _section("Student and teacher, token by token", _tokens(run)),
        _section("Who works when", _pipeline(run)),
        _section("Events", _events(run.events)),
        f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>",
    ]
    return page(run.name, "".join(sections))


def points_of(history: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of a metric; `distill/` is the estimate, whose name tells divergence and objective."""
    if key == "distill/":
        names = (n for m in history for n in m if n.startswith(key) and n.endswith(("_full", "_sampled", "_support")))
        key = next(names, key)
    return [(m["step"], m[key]) for m in history if key in m]


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}"


def _figures(run: RunRecord) -> str:
    if not run.summary:
        steps = max((int(m["step"]) for m in run.history), default=0)
        return f"<p>The run is not over: {steps} steps are recorded.</p>"
    return _table([(words, f"{run.summary[key]:,.4g}") for key, words in SUMMARY.items() if key in run.summary])


def _curves(run: RunRecord) -> str:
    tasks = list(run.traces)[: NUM_COLOURS - 1] if len(run.traces) > 1 else []
    names = {"all tasks": "", **{task: f"_{task}" for task in tasks}}
    shown = chart_groups(lambda key: {name: points_of(run.history, key + ending) for name, ending in names.items()})
    return (legend(list(names)) if tasks and shown else "") + (shown or "<p>No step is recorded yet.</p>")


def chart_groups(series_of: Callable[[str], Mapping[str, Points]]) -> str:
    """Return the charts of all metrics, group by group; those without a point are left out."""
    groups = []
    for group, titles in CURVES.items():
        known = {title: series_of(key) for key, title in titles.items()}
        figures = [curves(title, series) for title, series in known.items() if any(series.values())]
        if figures:
            groups.append(f'<h3>{group}</h3><div class="grid2">{"".join(figures)}</div>')
    return "".join(groups)


def _tokens(run: RunRecord) -> str:
    if not run.traces:
        return "<p>No evaluation has compared student and teacher yet.</p>"
    sections = "".join(tokens_sections(task, told) for task, told in run.traces.items())
    return f"<p>Held-out samples of the student after update {run.traces_step}.</p>{sections}"


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return "<p>Nothing befell the run.</p>"
    rows = "".join(
        f"<tr><td>{datetime.fromtimestamp(e.get('time', 0), UTC):%Y-%m-%d %H:%M:%S}</td>"
        f"<td>{escape(str(e.get('kind')))}</td><td>{escape(str(e.get('message')))}</td></tr>"
        for e in events
    )
    return f'<table class="texts"><tr><th>UTC</th><th>what</th><th></th></tr>{rows}</table>'


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
