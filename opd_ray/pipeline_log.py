"""spans.jsonl: what each worker did in each step, for the report's timeline; and the metrics that follow from it."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from opd_ray.config.schema import Config
from opd_ray.json_lines import JsonLines
from opd_ray.pipeline import Span, SplitWatch, Timeline, Window
from opd_ray.protocol import Metrics
from opd_ray.routing import teachers_of

FILE = "spans.jsonl"
_LEARNER = "learner"
_Stamp = tuple[str, float, float]  # as in the summaries: worker, start, end


class PipelineLog:
    """Owner of one run's spans. The learner's are the driver's: all ranks work at once."""

    def __init__(self, config: Config, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        teachers = teachers_of(config).by_name.values()
        sizes = {
            "rollout": config.rollout.num_workers,
            "teacher": sum(teacher.num_workers for teacher in teachers),
            "learner": config.learner.num_ranks,
        }
        self._timeline = Timeline(num_workers={**sizes, _LEARNER: 1}, lag=config.max_staleness)
        self._watch = SplitWatch(
            sizes=sizes,
            gpus=config.rollout.gpus_per_worker > 0,
            max_staleness=config.max_staleness,
            colocated=config.cluster.sleep,
        )
        self._lines = JsonLines(folder, warn=lambda _: None)  # the tracker tells of a full disk
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Start a step's window."""
        self._start = self._last = self._clock()
        self._phases: list[Span] = []

    def passed(self, phase: str) -> None:
        """Note what the time since the last note went into."""
        now = self._clock()
        self._phases.append(Span(lane=_LEARNER, phase=phase, start=self._last, end=now))
        self._last = now

    def step(self, step: int, groups: Sequence[_Stamp], scores: Sequence[_Stamp]) -> Metrics:
        """End the window of a step; write and return what is known of the newest one that is complete."""
        spans = [span for span in self._phases if span.phase != "wait"]
        for phase, stamps in (("generate", groups), ("score", scores)):
            spans += [Span(lane=lane, phase=phase, start=start, end=end) for lane, start, end in stamps if lane]
        window = self._timeline.add(step, start=self._start, end=self._last, spans=spans)
        if window is None:
            return {}
        self._write(window)
        return self._timeline.metrics(window)

    def hint(self, metrics: Metrics) -> str:
        """Return what to change when the pools are badly split, once, or nothing."""
        return self._watch.hint(metrics)

    def _write(self, window: Window) -> None:
        line = {
            "step": window.step,
            "start": window.start,
            "end": window.end,
            "spans": [[s.lane, s.phase, round(s.start, 4), round(s.end, 4)] for s in window.spans],
        }
        self._lines.append(FILE, line)


def read_windows(folder: Path, *, last: int) -> list[Window]:
    """Return the newest windows that a run has written, oldest first; a line that it is about to write is left out."""
    path = folder / FILE
    lines = path.read_text().split("\n")[:-1][-last:] if path.exists() else []
    return [
        Window(
            step=line["step"],
            start=line["start"],
            end=line["end"],
            spans=[Span(lane=lane, phase=phase, start=a, end=b) for lane, phase, a, b in line["spans"]],
        )
        for line in map(json.loads, lines)
    ]
