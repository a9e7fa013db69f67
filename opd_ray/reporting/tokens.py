"""Student against teacher, token by token: a scatter, gaps by position, the worst tokens, responses in colour."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from opd_ray.reporting.charts import Axes, figure, ticks

_LEAST = 1e-4  # smallest probability of the scatter's axes
_FULL_COLOUR_NATS = 3.0  # |log q - log p| of the strongest colour
_LEAST_SHARE = 1e-3  # that is told in percent
_MAX_TRACES = 4
_MEANS = {
    "reverse_kl": "KL(student || teacher), nats",
    "student_entropy": "student's entropy, nats",
    "teacher_entropy": "teacher's entropy, nats",
    "topk_overlap": "overlap of the 16 likeliest tokens",
    "student_mass_in_teacher_topk": "student's mass in the teacher's 16",
    "teacher_mass_in_student_topk": "teacher's mass in the student's 16",
}
_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}


def tokens_sections(task: str, told: Mapping[str, Any]) -> str:
    """Return the figures and the responses of one task."""
    points = told["points"]
    if not points["student"]:
        return f"<h3>{escape(task)}</h3><p>No token was compared.</p>"
    figures = [scatter(points), gap_by_position(told["positions"])]
    below = told["metrics"]["negative_reward_fraction"]
    words = (
        f"{told['num_tokens']:,} sampled tokens; of {below:.0%} of them the teacher thinks less than the student does"
        f" (a negative reward). {len(points['student']):,} are shown."
    )
    return (
        f'<h3>{escape(task)}</h3><p>{words}</p>{means(told["metrics"])}<div class="pair">{"".join(figures)}</div>'
        f"<h4>Tokens that cost most</h4>{worst_tokens(told['worst'])}"
        f"<h4>Sampled responses</h4>{_LEGEND}{''.join(map(trace, told['traces'][:_MAX_TRACES]))}"
    )


def means(metrics: Mapping[str, float]) -> str:
    """Return what an evaluation says of all tokens; of a teacher without hidden states, less."""
    known = [(words, f"{metrics[name]:.4g}") for name, words in _MEANS.items() if name in metrics]
    cells = "".join(f"<tr><td>{words}</td><td>{value}</td></tr>" for words, value in known)
    return f"<table>{cells}</table>"


def scatter(points: Mapping[str, Sequence[Any]]) -> str:
    """Return the probabilities of sampled tokens, the student's across and the teacher's up, on logarithmic axes."""
    low = math.log10(_LEAST)
    decades = [low + i for i in range(round(-low) + 1)]
    axes = Axes(x0=low, x1=0.0, y0=low, y1=0.0, x_ticks=decades, y_ticks=decades, form=lambda v: f"1e{v:.0f}")
    marks = [axes.line([(low, low), (0, 0)], css="diagonal")]
    columns = (points["student"], points["teacher"], points["position"], points["token"])
    for p, q, position, token in zip(*columns, strict=True):
        x, y = axes.at(math.log10(max(p, _LEAST)), math.log10(max(q, _LEAST)))
        words = f"{_visible(token)} at {position}: student {p:.3g}, teacher {q:.3g}"
        css = "below" if q < p else "above"
        marks.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="2"><title>{escape(words)}</title></circle>')
    title = "probability of sampled tokens: student across, teacher up"
    return figure(title, axes.frame() + "".join(marks))


def gap_by_position(bins: Sequence[Mapping[str, float]]) -> str:
    """Return the median and the 10 to 90 % band of log q - log p along the response."""
    xs = [(b["first"] + b["last"]) / 2 for b in bins]
    values = [b[name] for b in bins for name in ("low", "high")] + [0.0]
    y_ticks = ticks(min(values), max(values))
    axes = Axes(
        x0=xs[0], x1=xs[-1], y0=y_ticks[0], y1=y_ticks[-1], y_ticks=y_ticks,
        x_ticks=[v for v in ticks(xs[0], xs[-1]) if xs[0] <= v <= xs[-1]],
    )  # fmt: skip
    band = [*zip(xs, (b["low"] for b in bins), strict=True)]
    band += reversed([*zip(xs, (b["high"] for b in bins), strict=True)])
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.at(*corner) for corner in band))
    middle = axes.line(list(zip(xs, (b["middle"] for b in bins), strict=True)), css="curve s0")
    zero = axes.line([(axes.x0, 0.0), (axes.x1, 0.0)], css="diagonal")
    content = f'{axes.frame()}<polygon class="band" points="{corners}"/>{zero}{middle}'
    return figure("log q - log p by position in the response: median, 10 to 90 % (nats)", content)


def worst_tokens(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tokens whose gaps sum up to the largest part of the divergence."""
    head = "".join(f"<th>{h}</th>" for h in ("token", "times", "mean log q - log p", "mean p", "mean q", "sum, nats"))
    body = "".join(
        f"<tr><td><code>{escape(_visible(row['token']))}</code></td><td>{row['count']}</td><td>{row['gap']:.3f}</td>"
        f"<td>{row['student']:.3f}</td><td>{row['teacher']:.3f}</td><td>{row['share']:.2f}</td></tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def trace(told: Mapping[str, Any]) -> str:
    """Return one response, each token in the colour of its log q - log p; hovering shows what both thought."""
    spans = []
    columns = (told["tokens"], told["student"], told["teacher"])
    for i, (token, log_p, log_q) in enumerate(zip(*columns, strict=True)):
        strength = min(abs(log_q - log_p) / _FULL_COLOUR_NATS, 1.0)
        css, gap = "below" if log_q < log_p else "above", "<wbr>" if token.startswith(" ") else ""
        tops = [(whose, told[f"{whose}_top"][i]) for whose in ("student", "teacher") if told[f"{whose}_top"]]
        spans.append(
            f'{gap}<span class="token {css}" style="--strength:{75 * strength:.0f}%" tabindex="0">'
            f"{escape(_visible(token))}{_tip(token, log_p, log_q, tops)}</span>"
        )
    prompt = f'<span class="prompt">{escape(told["prompt"])}</span>'
    return f'<div class="trace">{prompt}{"".join(spans)}</div>'


def _tip(token: str, log_p: float, log_q: float, tops: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    rows = f"<b>{_marked(token)}</b> student {_share(log_p)}, teacher {_share(log_q)}"
    for whose, top in tops:
        likeliest = ", ".join(f"<b>{_marked(text)}</b> {_share(logprob)}" for text, logprob in top)
        rows += f"<br>{whose}: {likeliest}"
    return f'<span class="tip">{rows}</span>'


def _share(logprob: float) -> str:
    share = math.exp(logprob)
    return f"{share:.1%}" if share >= _LEAST_SHARE or share == 0 else f"{share:.0e}"


def _marked(token: str) -> str:
    """Return a token in one line."""
    return escape(_visible(token).strip() or "∅")


def _visible(token: str) -> str:
    return "".join(_VISIBLE.get(character, character) for character in token)


_LEGEND = (
    '<p class="legend"><span class="token below" style="--strength:75%">teacher thinks less of it</span> '
    '<span class="token above" style="--strength:75%">teacher thinks more of it</span> in full colour from a factor of '
    f"{math.exp(_FULL_COLOUR_NATS):.0f} on; hover or press Tab for alternatives</p>"
)
