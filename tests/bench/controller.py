"""Part `controller`: what the loop, its window, dispatch, screen and tracker take, with fleets that do nothing."""

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Figure, at_most

from opd_ray.comparison import Comparison
from opd_ray.config.schema import BatchMode
from opd_ray.controller import Fleets, Loop
from opd_ray.data.batches import TaskPrompts
from opd_ray.dispatch import Dispatcher
from opd_ray.protocol import (
    Batch,
    GenerateRequest,
    GroupHandle,
    GroupSummary,
    Lasting,
    Metrics,
    Payload,
    Prompt,
    SamplingOptions,
    ScoreHandle,
    ScoreRequest,
    ScoreSummary,
    WeightBundle,
)
from opd_ray.routing import DEFAULT_TEACHER, Teachers
from opd_ray.schedule import Schedule
from opd_ray.screen import TeacherScreen
from opd_ray.services import BadGroup
from opd_ray.state import RunDir
from opd_ray.tracking import RunTracker
from opd_ray.window import GroupWindow
from workers.teacher.routed import RoutedTeachers

_PART = "controller"
_TASK = "bench"
_NUM_PROMPTS = 100_000  # of the training set
_NUM_SAMPLES = 8
_MAX_STEP_MS, _MAX_GROWTH, _MAX_LEAK_KB = 5.0, 1.2, 0.5
_ASKED = ScoreRequest(payload=Payload.sampled)
_SAMPLING = SamplingOptions(
    num_samples=_NUM_SAMPLES, max_response_tokens=256, temperature=1.0, top_p=1.0, support_size=0, support_top_p=1.0
)
_SCORE = ScoreSummary(num_tokens=800, num_bytes=3200, dropped_mass_sum=0.0, score_s=0.1)


def controller() -> Iterator[Figure]:
    """Yield the figures of the part; about a minute."""
    prompts = [
        Prompt(ids_P=np.zeros(16, dtype=np.int32), index=i, task=_TASK, verifier=_TASK, answer=None)
        for i in range(_NUM_PROMPTS)
    ]
    few = _step_ms(prompts, num_groups=64, num_steps=200)
    many = _step_ms(prompts, num_groups=1024, num_steps=40)
    yield at_most(_MAX_STEP_MS, part=_PART, name="step_64_groups", value=few, unit="ms")
    yield Figure(part=_PART, name="step_1024_groups", value=many, unit="ms")
    yield at_most(_MAX_GROWTH, part=_PART, name="growth_to_1024", value=many / few / 16, unit="of linear")
    leak = _leak_kb(prompts, num_steps=500)
    yield at_most(_MAX_LEAK_KB, part=_PART, name="memory_growth", value=leak, unit="kB a step")


def _step_ms(prompts: Sequence[Prompt], *, num_groups: int, num_steps: int) -> float:
    """Return the median time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        line = _Line()
        _loop(prompts, num_groups=num_groups, num_steps=num_steps, folder=Path(folder), line=line).run()
    return 1e3 * statistics.median(np.diff(line.times).tolist())


def _leak_kb(prompts: Sequence[Prompt], *, num_steps: int) -> float:
    """Return by how much Python's memory grows a step over the later half of a run."""
    with tempfile.TemporaryDirectory() as folder:
        line = _Line()
        tracemalloc.start()
        _loop(prompts, num_groups=64, num_steps=num_steps, folder=Path(folder), line=line).run()
        tracemalloc.stop()
    half = num_steps // 2
    return (line.bytes[-1] - line.bytes[half]) / 1e3 / (num_steps - half)


def _loop(prompts: Sequence[Prompt], *, num_groups: int, num_steps: int, folder: Path, line: "_Line") -> Loop:
    teacher = RoutedTeachers({DEFAULT_TEACHER: _Teacher()}, Teachers(by_name={}, of_task={}))
    fleets = Fleets(rollout=_Rollout(), teacher=teacher, learner=_Learner())
    schedule = Schedule(num_steps=num_steps, max_staleness=1, eval_every=0, save_every=0)
    dispatcher = Dispatcher(
        rollout=fleets.rollout,
        teacher=fleets.teacher,
        prompts=TaskPrompts(prompts, num_prompts=num_groups, shares={_TASK: 1.0}, mode=BatchMode.mixed, seed=0),
        sampling={_TASK: _SAMPLING},
        asked=_ASKED,
        seed=0,
    )
    return Loop(
        schedule=schedule,
        fleets=fleets,
        window=GroupWindow(dispatcher=dispatcher, schedule=schedule, num_prompts=num_groups),
        screen=TeacherScreen(dispatcher=dispatcher, max_bad_fraction=0.1, quarantine=_Quarantine()),
        evaluator=_Evaluator(),
        checkpoints=_Checkpoints(),
        tracker=RunTracker(RunDir(path=folder), step=0, num_samples=2, sinks=[], line=line),
    )


class _Line:
    def __init__(self) -> None:
        self.times: list[float] = []
        self.bytes: list[int] = []

    def show_step(self, step: int, metrics: Metrics) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())
        self.bytes.append(tracemalloc.get_traced_memory()[0])

    def say(self, message: str) -> None:
        raise RuntimeError(message)


class _Rollout:
    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        return [GroupHandle(request=request, summary=request, group=None) for request in requests]

    def load(self, weights: WeightBundle) -> Metrics:  # noqa: ARG002
        return {"time/load_s": 0.0}

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        return [
            GroupSummary(
                prompt_index=group.summary.prompt.index,
                task=group.request.prompt.task,
                num_prompt_tokens=16,
                response_lengths=(100,) * _NUM_SAMPLES,
                num_loss_tokens=800,
                num_truncated=0,
                rewards=(1.0,) * _NUM_SAMPLES,
                oldest_version=0,
                text="text " * 100,
                generate_s=1.0,
            )
            for group in groups
        ]

    def first(self, groups: Sequence[GroupHandle], *, num_groups: int) -> list[int]:  # noqa: ARG002
        return list(range(num_groups))


class _Teacher:
    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:  # noqa: ARG002
        return [ScoreHandle(teacher=DEFAULT_TEACHER, summary=None, score=None) for _ in groups]

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        return [_SCORE] * len(scores)

    def follow(self, weights: WeightBundle) -> Metrics:  # noqa: ARG002
        return {}

    def save(self, folder: str) -> None: ...

    def restore(self, folder: str) -> None: ...


class _Learner:
    version = 0

    def update(self, batch: Batch) -> Metrics:  # noqa: ARG002
        return {f"train/metric_{i}": float(i) for i in range(40)}

    def publish(self, version: int) -> WeightBundle:
        return WeightBundle(version=version, manifest=None, buffer=None)

    def compare(self, batch: Batch) -> Comparison:
        raise NotImplementedError(batch)

    def save(self, folder: str) -> None: ...

    def restore(self, folder: str) -> None: ...

    def export(self, folder: str) -> None: ...


@dataclass
class _Quarantine:
    where: str = ""

    def add(self, group: BadGroup) -> None: ...

    def warn(self, message: str) -> None: ...


class _Evaluator:
    def evaluate(self, version: int) -> Metrics:  # noqa: ARG002
        return {}


class _Checkpoints:
    def save(self, step: int, *parts: Lasting) -> None: ...
