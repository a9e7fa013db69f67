"""Stand-ins for the fleets and for what the loop reports to: each writes what it was asked to one list of events."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from opd_ray.comparison import Comparison, TokenPoints
from opd_ray.controller import Fleets
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
from opd_ray.schedule import Schedule
from opd_ray.services import BadGroup
from opd_ray.window import GroupWindow

Event = tuple[object, ...]
SAMPLING = SamplingOptions(
    num_samples=2, max_response_tokens=8, temperature=1.0, top_p=1.0, support_size=4, support_top_p=0.9
)
OF_SORT = replace(SAMPLING, num_samples=3, max_response_tokens=5)
SCORE_REQUEST = ScoreRequest(payload=Payload.support, support="union", top_k=4, top_p=0.9)
PROMPTS_PER_STEP = 3  # prompt i of step s has the index s * PROMPTS_PER_STEP + i


def make_prompt(index: int = 0, *, task: str = "exact", answer: str | None = None) -> Prompt:
    return Prompt(ids_P=np.array([1, 2], dtype=np.int32), index=index, task=task, verifier=task, answer=answer)


def make_request(index: int = 0, *, task: str = "exact", version: int = 0, seed: int = 7) -> GenerateRequest:
    prompt = make_prompt(index, task=task)
    return GenerateRequest(prompt=prompt, sampling=SAMPLING, version=version, seed=seed, step=0, position=index)


def make_summary(
    *lengths: int,
    rewards: Sequence[float] = (),
    num_truncated: int = 0,
    text: str = "",
    task: str = "exact",
    prompt_index: int = 0,
) -> GroupSummary:
    return GroupSummary(
        prompt_index=prompt_index,
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
    slow: Callable[[int], bool] = lambda _index: False  # which groups finish last, by their prompt's index

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        (version,) = {r.version for r in requests}
        self.events.append(("generate", requests[0].prompt.index // PROMPTS_PER_STEP, version))
        self.requests += requests
        return [GroupHandle(request=r, summary=r, group=("group", r.prompt.index, r.seed)) for r in requests]

    def first(self, groups: Sequence[GroupHandle], *, num_groups: int) -> list[int]:
        by_time = sorted(range(len(groups)), key=lambda i: (self.slow(groups[i].request.prompt.index), i))
        return sorted(by_time[:num_groups])

    def load(self, weights: WeightBundle) -> Metrics:
        self.events.append(("load", weights.version))
        return {"time/load_s": 0.25}

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        return [
            make_summary(
                2,
                3,
                rewards=self.rewards,
                text=str(g.summary.prompt.index),
                task=g.request.prompt.task,
                prompt_index=g.summary.prompt.index,
            )
            for g in groups
        ]


@dataclass
class FakeTeacher:
    events: list[Event]
    fault: Callable[[int, int], str] = lambda _index, _seed: ""  # of a group, by its prompt's index and its seed

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        self.events.append(("score", groups[0].group[1] // PROMPTS_PER_STEP, request))
        return [ScoreHandle(teacher="teacher", summary=g.group, score=("score of", g.group)) for g in groups]

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        return [
            ScoreSummary(num_tokens=5, num_bytes=20, dropped_mass_sum=0.0, score_s=0.1, fault=self.fault(index, seed))
            for _, index, seed in (score.summary for score in scores)
        ]

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
    version: int = 0

    def update(self, batch: Batch) -> Metrics:
        self.events.append(("learn", batch.step))
        self.batches.append(batch)
        return {"train/loss": float(batch.step)}

    def publish(self, version: int) -> WeightBundle:
        self.events.append(("publish", version))
        self.version = version
        return WeightBundle(version=version, manifest=None, buffer=None)

    def compare(self, batch: Batch) -> Comparison:
        self.events.append(("compare", batch.step))
        self.batches.append(batch)
        return make_comparison(kl_sum=22.5, num_tokens=10 * len(batch.groups))

    def save(self, folder: str) -> None:
        self.events.append(("save", folder))
        Path(folder, "weights").write_text("whole")

    def wait_saved(self) -> None:
        self.events.append(("saved", self.version))

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

    def replacement(self, step: int, *, position: int, attempt: int) -> Prompt:
        """Return prompt 1000 * attempt + the index of the one that is replaced."""
        replaced = self.batch(step)[position]
        return make_prompt(1000 * attempt + replaced.index, task=replaced.task)


@dataclass
class FakeScreen:
    events: list[Event]

    def whole(self, batch: Batch) -> tuple[Batch, Metrics]:
        self.events.append(("screen", batch.step))
        return batch, {"teacher/bad_groups": 0.0}


@dataclass
class FakeQuarantine:
    groups: list[BadGroup] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    where: str = "the/quarantine.jsonl"

    def add(self, group: BadGroup) -> None:
        self.groups.append(group)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


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
        assert [type(part) for part in parts] == [FakeLearner, FakeTeacher, GroupWindow]
        self.events.append(("checkpoint", step))


@dataclass
class FakeTracker:
    events: list[Event]
    metrics: dict[int, Metrics] = field(default_factory=dict)
    summaries: dict[int, Sequence[GroupSummary]] = field(default_factory=dict)
    scored: dict[int, Sequence[ScoreSummary]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)  # recorded by the process before

    def passed(self, phase: str) -> None:
        pass

    def log(
        self,
        step: int,
        metrics: Metrics,
        summaries: Sequence[GroupSummary] = (),
        scored: Sequence[ScoreSummary] = (),
    ) -> None:
        self.events.append(("log", step))
        self.metrics[step], self.summaries[step], self.scored[step] = metrics, summaries, scored

    def compare(self, step: int, by_task: Mapping[str, Comparison]) -> None:
        self.events.append(("compare", step, sorted(by_task)))

    def holds(self, step: int) -> bool:
        return step in self.metrics or step in self.held


def fake_dispatcher(
    fleets: Fleets, *, prompts: FakePrompts | None = None, asked: ScoreRequest = SCORE_REQUEST, seed: int = 5
) -> Dispatcher:
    return Dispatcher(
        rollout=fleets.rollout,
        teacher=fleets.teacher,
        prompts=prompts or FakePrompts(),
        sampling={"exact": SAMPLING, "sort": OF_SORT},
        asked=asked,
        seed=seed,
    )


def fake_window(fleets: Fleets, *, num_steps: int, max_staleness: int = 0, overprovision: float = 0.0) -> GroupWindow:
    schedule = Schedule(num_steps=num_steps, max_staleness=max_staleness, eval_every=0, save_every=0)
    return GroupWindow(
        dispatcher=fake_dispatcher(fleets),
        schedule=schedule,
        num_prompts=PROMPTS_PER_STEP,
        overprovision=overprovision,
    )


def fake_fleets(events: list[Event], *, rewards: Sequence[float] = ()) -> Fleets:
    rollout = FakeRollout(events, rewards=rewards)
    return Fleets(rollout=rollout, teacher=FakeTeacher(events), learner=FakeLearner(events))


def make_comparison(*, kl_sum: float, num_tokens: int, **given: object) -> Comparison:
    """Return a comparison without any tokens of its own, unless they are given."""
    none = np.empty(0, dtype=np.float32)
    points = TokenPoints(
        ids_M=none.astype(np.int32),
        positions_M=none.astype(np.int32),
        student_logprobs_M=none,
        teacher_logprobs_M=none,
        weights_M=none,
    )
    fields: dict = {"sums": {}, "points": points, "token_texts": {}, "traces": (), **given}
    return Comparison(kl_sum=kl_sum, num_tokens=num_tokens, **fields)
