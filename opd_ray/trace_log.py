"""What is kept of an evaluation's comparison of student and teacher: a line of traces.jsonl, read by the report.

A line: {"step", "tasks": {task: {"num_tokens", "metrics": {name: value}, "points": {"student", "teacher", "position",
"token"}, "positions": [...], "worst": [...], "traces": [...]}}}. The metrics are over all `num_tokens` tokens, all
else is of some of them; probabilities and log-probs are rounded, texts are as the tokenizer gives them.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from opd_ray.comparison import Comparison, TokenTrace
from opd_ray.json_lines import JsonLines
from opd_ray.sinks import SampleRow

FILE = "traces.jsonl"
_NUM_SCATTERED, _NUM_WORST, _NUM_POSITION_BINS = 1500, 15, 12
_DIGITS = 5


def add_traces(lines: JsonLines, step: int, by_task: Mapping[str, Comparison]) -> None:
    """Add an evaluation's line."""
    lines.append(FILE, {"step": step, "tasks": {task: _shown(compared) for task, compared in by_task.items()}})


def trace_rows(step: int, by_task: Mapping[str, Comparison]) -> list[SampleRow]:
    """Return the traced responses for a table: each token with log q - log p of it."""
    return [
        SampleRow(
            step=step,
            text=trace.prompt + "".join(trace.tokens),
            reward=None,
            signal=" ".join(
                f"{token}({q - p:+.2f})"
                for token, p, q in zip(trace.tokens, trace.student_logprobs, trace.teacher_logprobs, strict=True)
            ),
        )
        for compared in by_task.values()
        for trace in compared.traces
    ]


def _shown(compared: Comparison) -> dict[str, Any]:
    points = compared.points
    chosen = slice(None, None, max(1, -(-len(points.ids_M) // _NUM_SCATTERED)))
    return {
        "num_tokens": compared.num_tokens,
        "metrics": {"reverse_kl": compared.kl, **compared.metrics()},
        "points": {
            "student": _rounded(np.exp(points.student_logprobs_M[chosen])),
            "teacher": _rounded(np.exp(points.teacher_logprobs_M[chosen])),
            "position": points.positions_M[chosen].tolist(),
            "token": [compared.token_texts[id_] for id_ in points.ids_M[chosen].tolist()],
        },
        "positions": _by_position(compared),
        "worst": _worst(compared),
        "traces": [_trace(trace) for trace in compared.traces],
    }


def _by_position(compared: Comparison) -> list[dict[str, float]]:
    """Return quantiles of log q - log p in bins of the position, each with as many tokens as the others."""
    positions_M = compared.points.positions_M
    if not len(positions_M):
        return []
    edges = np.unique(np.quantile(positions_M, np.linspace(0, 1, _NUM_POSITION_BINS + 1)).astype(int))
    edges = np.append(edges[:-1], positions_M.max() + 1) if len(edges) > 1 else np.array([edges[0], edges[0] + 1])
    bins = []
    for first, end in pairwise(edges.tolist()):
        low, middle, high = compared.points.quantiles((positions_M >= first) & (positions_M < end))
        bins.append({"first": first, "last": end - 1, "low": low, "middle": middle, "high": high})
    return bins


def _worst(compared: Comparison) -> list[dict[str, Any]]:
    """Return the tokens of which the teacher thinks less than the student, the largest part of the KL first."""
    points = compared.points
    rows = []
    for id_ in np.unique(points.ids_M).tolist():
        of_id = points.ids_M == id_
        rewards = points.rewards_M[of_id]
        rows.append(
            {
                "token": compared.token_texts[id_],
                "id": id_,
                "count": int(of_id.sum()),
                "gap": float(rewards.mean()),
                "student": float(np.exp(points.student_logprobs_M[of_id]).mean()),
                "teacher": float(np.exp(points.teacher_logprobs_M[of_id]).mean()),
                "share": float(-rewards.sum()),
            }
        )
    return sorted(rows, key=lambda row: -row["share"])[:_NUM_WORST]


def _trace(trace: TokenTrace) -> dict[str, Any]:
    return {
        "prompt": trace.prompt,
        "tokens": trace.tokens,
        "student": _rounded(trace.student_logprobs),
        "teacher": _rounded(trace.teacher_logprobs),
        "student_top": [[[text, round(p, _DIGITS)] for text, p in of_token] for of_token in trace.student_top],
        "teacher_top": [[[text, round(q, _DIGITS)] for text, q in of_token] for of_token in trace.teacher_top],
    }


def _rounded(values: Sequence[float] | np.ndarray[Any, Any]) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]
