"""Where a run's numbers go: metrics.jsonl and samples.jsonl always, a service if asked, the terminal."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opd_ray.comparison import Comparison
from opd_ray.console import StepLine
from opd_ray.json_lines import JsonLines, append_whole
from opd_ray.metrics import rollout_metrics, samples_shown
from opd_ray.mismatch import MismatchWatch
from opd_ray.pipeline_log import FILE as SPANS_FILE
from opd_ray.pipeline_log import PipelineLog
from opd_ray.protocol import GroupSummary, Metrics, ScoreSummary
from opd_ray.sinks import SampleRow, Sink
from opd_ray.state import RunDir
from opd_ray.trace_log import FILE as TRACES_FILE
from opd_ray.trace_log import add_traces, trace_rows


class RunTracker:
    """`Tracker` of a run dir. Nothing of a step stays in memory but its number."""

    def __init__(  # noqa: PLR0913 - every place that numbers go to
        self,
        run_dir: RunDir,
        *,
        step: int,
        num_samples: int,
        sinks: Sequence[Sink],
        line: StepLine,
        measured: Metrics = MappingProxyType({}),  # before the first step, and logged with it
        counted: Callable[[], Metrics] = dict,  # since the process started, logged with every step
        pipeline: PipelineLog | None = None,
    ) -> None:
        self._steps = {line["step"] for line in _kept_lines(run_dir.path / "metrics.jsonl", step=step)}
        for name in ("samples.jsonl", SPANS_FILE, TRACES_FILE, run_dir.quarantine.name):
            _kept_lines(run_dir.path / name, step=step)
        self._run_dir = run_dir
        self._lines = JsonLines(run_dir.path, warn=self._cannot_write)
        self._num_samples = num_samples
        self._sinks = sinks
        self._line = line
        self._measured = dict(measured)
        self._counted = counted
        self._mismatch = MismatchWatch()
        self._pipeline = pipeline
        self._last = time.perf_counter()

    def passed(self, phase: str) -> None:
        """Note what the time since the last note went into."""
        if self._pipeline:
            self._pipeline.passed(phase)

    def log(
        self,
        step: int,
        metrics: Metrics,
        summaries: Sequence[GroupSummary] = (),
        scored: Sequence[ScoreSummary] = (),
    ) -> None:
        """Record a step in every place: one line of metrics.jsonl."""
        record = {"step": step, **self._measured, **metrics, **self._counted()}
        self._measured = {}
        if summaries:
            record |= rollout_metrics(summaries) | self._rates(metrics, summaries)
        if summaries and self._pipeline:
            record |= self._pipeline.step(step, [s.span for s in summaries], [s.span for s in scored])
        self._last = time.perf_counter()
        self._steps.add(step)
        self._append("metrics.jsonl", record)
        samples = samples_shown(summaries, num_samples=self._num_samples)
        for summary in samples:
            rewards = list(summary.rewards)
            self._append("samples.jsonl", {"step": step, "text": summary.text, "rewards": rewards})
        for sink in self._sinks:
            sink.log(step, record)
            if samples and any(name.startswith("eval/") for name in metrics):
                sink.show([_row(step, summary) for summary in samples])
        self._line.show_step(step, record)
        for warning in self._mismatch.warnings(record):
            record_event(self._run_dir, kind="engine_mismatch", message=f"step {step}: {warning}")
            self._line.say(f"warning: {warning}")
        if self._pipeline and (hint := self._pipeline.hint(record)):
            record_event(self._run_dir, kind="pools_badly_split", message=f"step {step}: {hint}")
            self._line.say(f"hint: {hint}")
        if self._pipeline:
            self._pipeline.begin()

    def compare(self, step: int, by_task: Mapping[str, Comparison]) -> None:
        """Record how student and teacher stand to one another at an evaluation's samples."""
        add_traces(self._lines, step, by_task)
        rows = trace_rows(step, by_task)
        for sink in self._sinks if rows else ():
            sink.show(rows)

    def holds(self, step: int) -> bool:
        """Whether a step has been recorded, by this process or by the one that it resumes."""
        return step in self._steps

    @property
    def history(self) -> list[dict[str, float]]:
        """Return what was recorded of every step, but for values that were not finite."""
        path = self._run_dir.path / "metrics.jsonl"
        records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return [{name: value for name, value in record.items() if value is not None} for record in records]

    def finish(self, summary: Metrics) -> None:
        """Write what waits for room, and summary.json; close the sinks."""
        self._lines.flush()
        (self._run_dir.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        for sink in self._sinks:
            sink.finish(summary)

    def keep(self, name: str, folder: Path, step: int) -> None:
        """Send a checkpoint or the student to the sinks."""
        for sink in self._sinks:
            sink.keep(name, folder, step)

    def _rates(self, metrics: Metrics, summaries: Sequence[GroupSummary]) -> dict[str, float]:
        step_s = time.perf_counter() - self._last - metrics.get("time/eval_s", 0.0)
        num_tokens = sum(length for s in summaries for length in s.response_lengths)
        return {"time/step_s": step_s, "perf/tokens_per_s": num_tokens / step_s}

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self._lines.append(name, _finite(record))

    def _cannot_write(self, words: str) -> None:
        record_event(self._run_dir, kind="log_failed", message=words)
        self._line.say(f"warning: {words}")


def record_event(run_dir: RunDir, *, kind: str, message: str) -> None:
    """Add a line to events.jsonl: what befell the run. Where the disk does not take it, only the console has it."""
    line = json.dumps({"time": time.time(), "kind": kind, "message": message}) + "\n"
    with suppress(OSError):
        append_whole(run_dir.path / "events.jsonl", line)


def _row(step: int, summary: GroupSummary) -> SampleRow:
    return SampleRow(step=step, text=summary.text, reward=summary.rewards[0] if summary.rewards else None)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities, which JSON does not have, by null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _kept_lines(path: Path, *, step: int) -> list[dict[str, float]]:
    """Drop what a run that is being resumed wrote after the checkpoint, all of it for step 0; return the rest."""
    if not path.exists():
        return []
    whole_lines = path.read_text().split("\n")[:-1]  # a crash may have cut the last one short
    kept = [line for line in map(json.loads, whole_lines) if 0 < step >= line["step"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept
