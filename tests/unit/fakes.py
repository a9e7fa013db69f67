"""Stand-ins for the fleets and for what the loop reports to: each writes what it was asked to one list of events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opd_ray.controller import Fleets
from opd_ray.protocol import (
    Batch,
    GenerateRequest,
    GroupHandle,
    GroupSummary,
    Metrics,
    Prompt,
    ScoreHandle,
    ScoreRequest,
    WeightBundle,
)
from opd_ray.services import Lasting

Event = tuple[object, ...]
PROMPTS_PER_STEP = 3  # prompt i of step s has the index s * PROMPTS_PER_STEP + i


def make_prompt(index: int = 0, *, task: str = "exact", answer: str | None = None) -> Prompt:
    return Prompt(ids_P=np.array([1, 2], dtype=np.int32), index=index, task=task, verifier=task, answer=answer)


def make_summary(
    *lengths: int, rewards: Sequence[float] = (), num_truncated: int = 0, text: str = "", task: str = "exact"
) -> GroupSummary:
    return GroupSummary(
        prompt_index=0,
        task=task,
        num_prompt_tokens=2,
        response_lengths=lengths,
        num_loss_tokens=sum(lengths),
        num_truncated=num_truncated,
        rewards=tuple(rewards),
        oldest_version=0,
        text=text,
        generate_s=0.5,
    )


@dataclass
class FakeRollout:
    events: list[Event]
    requests: list[GenerateRequest] = field(default_factory=list)
    rewards: Sequence[float] = ()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        (version,) = {r.version for r in requests}
        self.events.append(("generate", requests[0].prompt.index // PROMPTS_PER_STEP, version))
        self.requests += requests
        return [GroupHandle(task=r.prompt.task, summary=r, group=("group", r.prompt.index, r.seed)) for r in requests]

    def load(self, weights: WeightBundle) -> Metrics:
        self.events.append(("load", weights.version))
        return {"time/load_s": 0.25}

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        return [make_summary(2, 3, rewards=self.rewards, text=str(g.summary.prompt.index), task=g.task) for g in groups]


@dataclass
class FakeTeacher:
    events: list[Event]

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        self.events.append(("score", groups[0].group[1] // PROMPTS_PER_STEP, request))
        return [ScoreHandle(teacher="teacher", summary=None, score=("score of", g.group)) for g in groups]

    def follow(self, weights: WeightBundle) -> Metrics:
        self.events.append(("follow", weights.version))
        return {"time/teacher_load_s": 0.5}

    def save(self, folder: str) -> None:
        self.events.append(("save teacher", folder))

    def restore(self, folder: str) -> None:
        self.events.append(("restore teacher", folder))


@dataclass
class FakeLearner:
    events: list[Event]
    batches: list[Batch] = field(default_factory=list)

    def update(self, batch: Batch) -> Metrics:
        self.events.append(("learn", batch.step))
        self.batches.append(batch)
        return {"train/loss": float(batch.step)}

    def publish(self, version: int) -> WeightBundle:
        self.events.append(("publish", version))
        return WeightBundle(version=version, manifest=None, buffer=None)

    def held_out_kl(self, batch: Batch) -> float:
        self.events.append(("held_out_kl", batch.step))
        self.batches.append(batch)
        return 0.75

    def save(self, folder: str) -> None:
        self.events.append(("save", folder))
        Path(folder, "weights").write_text("whole")

    def restore(self, folder: str) -> None:
        self.events.append(("restore", folder))

    def export(self, folder: str) -> None:
        self.events.append(("export", folder))


@dataclass
class FakePrompts:
    always_the_same: bool = False
    tasks: Sequence[str] = ("exact",)  # in turn

    def batch(self, step: int) -> list[Prompt]:
        first, stride = (0, 0) if self.always_the_same else (step * PROMPTS_PER_STEP, 1)
        indices = [first + stride * i for i in range(PROMPTS_PER_STEP)]
        return [make_prompt(i, task=self.tasks[i % len(self.tasks)]) for i in indices]


@dataclass
class FakeEvaluator:
    events: list[Event]

    def evaluate(self, version: int) -> Metrics:
        self.events.append(("evaluate", version))
        return {"eval/accuracy": float(version)}


@dataclass
class FakeCheckpoints:
    events: list[Event]

    def save(self, step: int, *parts: Lasting) -> None:
        assert [type(part) for part in parts] == [FakeLearner, FakeTeacher]
        self.events.append(("checkpoint", step))


@dataclass
class FakeTracker:
    events: list[Event]
    metrics: dict[int, Metrics] = field(default_factory=dict)
    summaries: dict[int, Sequence[GroupSummary]] = field(default_factory=dict)

    def log(self, step: int, metrics: Metrics, summaries: Sequence[GroupSummary] = ()) -> None:
        self.events.append(("log", step))
        self.metrics[step], self.summaries[step] = metrics, summaries


def fake_fleets(events: list[Event], *, rewards: Sequence[float] = ()) -> Fleets:
    rollout = FakeRollout(events, rewards=rewards)
    return Fleets(rollout=rollout, teacher=FakeTeacher(events), learner=FakeLearner(events))
