"""Summaries in, metrics out: the pure arithmetic behind `rollout/*` and the step's rates."""

import itertools
import statistics
from collections.abc import Mapping, Sequence

from opd_ray.protocol import GroupSummary


def rollout_metrics(summaries: Sequence[GroupSummary]) -> dict[str, float]:
    """Return the `rollout/*` metrics of a batch; `rollout/accuracy` only where answers were given."""
    lengths = [length for s in summaries for length in s.response_lengths]
    metrics = {
        "rollout/num_responses": float(len(lengths)),
        "rollout/response_tokens": float(sum(lengths)),
        "rollout/response_tokens_mean": sum(lengths) / len(lengths),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/truncated_fraction": sum(s.num_truncated for s in summaries) / len(lengths),
        "rollout/repetition": sum(s.repetition for s in summaries) / len(summaries),
        "time/generate_s_max": max(s.generate_s for s in summaries),
    }
    return metrics | mean_reward("rollout/accuracy", summaries)


def mean_reward(name: str, summaries: Sequence[GroupSummary]) -> dict[str, float]:
    """Return the mean reward over all responses under a name, and with several tasks under `<name>_<task>` as well.

    Nothing where no answers were given.
    """
    tasks = sorted({s.task for s in summaries})
    parts = {name: list(summaries)}
    if len(tasks) > 1:
        parts |= {f"{name}_{task}": [s for s in summaries if s.task == task] for task in tasks}
    rewards = {part: [reward for s in of_part for reward in s.rewards] for part, of_part in parts.items()}
    return {part: sum(values) / len(values) for part, values in rewards.items() if values}


def samples_shown(summaries: Sequence[GroupSummary], *, num_samples: int) -> list[GroupSummary]:
    """Return the first groups of a batch, the tasks in turn: every task has one as long as there is room."""
    by_task: dict[str, list[GroupSummary]] = {}
    for summary in summaries:
        by_task.setdefault(summary.task, []).append(summary)
    rounds = itertools.zip_longest(*by_task.values())
    return [summary for of_round in rounds for summary in of_round if summary is not None][:num_samples]


def summarise(history: Sequence[Mapping[str, float]], *, wall_s: float) -> dict[str, float]:
    """Return summary.json of a run from its steps, first to last; what was never measured is left out."""
    bad_groups = [m["teacher/bad_groups"] for m in history if "teacher/bad_groups" in m]
    rates = [m["perf/tokens_per_s"] for m in history if "perf/tokens_per_s" in m]
    summary = {"wall_s": wall_s, "steps": max(m["step"] for m in history)}
    if rates:
        summary["tokens_per_s"] = statistics.median(rates)
        summary["step_s"] = statistics.median(m["time/step_s"] for m in history if "time/step_s" in m)
    if bad_groups:
        summary["bad_groups"] = sum(bad_groups)
    for name, key in (("student_accuracy", "eval/accuracy"), ("reverse_kl", "eval/reverse_kl")):
        of_tasks = {
            k.removeprefix(key) for m in history for k in m if k.startswith(key) and not k.startswith(f"{key}_avg")
        }
        for task in sorted(of_tasks):  # "" for all tasks, or "_<task>"
            values = [m[key + task] for m in history if key + task in m]
            summary |= {f"{name}_before{task}": values[0], f"{name}_after{task}": values[-1]}
    return summary
