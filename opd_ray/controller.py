"""The loop of on-policy distillation: schedules the fleets, passes references, never touches a token."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from opd_ray.protocol import (
    Batch,
    GenerateRequest,
    Learner,
    Metrics,
    RolloutFleet,
    SamplingOptions,
    ScoreRequest,
    TeacherFleet,
    WeightBundle,
)
from opd_ray.schedule import Schedule, derive_seed
from opd_ray.services import Checkpoints, Evaluator, PromptSource, Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleets:
    """The three pools of workers."""

    rollout: RolloutFleet
    teacher: TeacherFleet
    learner: Learner

    def load(self, weights: WeightBundle) -> Metrics:
        """Give a version of the student to those who sample from it, and to teachers that follow it."""
        return {**self.rollout.load(weights), **self.teacher.follow(weights)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Everything one run is made of. `run` returns after the last update."""

    schedule: Schedule
    sampling: Mapping[str, SamplingOptions]  # by task
    asked: ScoreRequest
    seed: int
    fleets: Fleets
    prompts: PromptSource
    evaluator: Evaluator
    checkpoints: Checkpoints
    tracker: Tracker

    def run(self, step: int = 0) -> None:
        """Train from update `step` to the last: generate, score, learn, publish."""
        fleets, schedule, window = self.fleets, self.schedule, deque[Batch]()
        fleets.load(fleets.learner.publish(step))
        if step == 0:
            self.tracker.log(step, self.evaluator.evaluate(step))
        while step < schedule.num_steps:
            while schedule.may_dispatch(step=step, num_in_flight=len(window)):
                window.append(self._dispatch(step + len(window), version=step))
            batch = window.popleft()
            learned = fleets.learner.update(batch)
            step += 1
            loaded = fleets.load(fleets.learner.publish(step))
            evaluated = self.evaluator.evaluate(step) if schedule.is_eval(step) else {}
            self.tracker.log(step, {**learned, **loaded, **evaluated}, fleets.rollout.summaries(batch.groups))
            if schedule.is_save(step):
                self.checkpoints.save(step, fleets.learner, fleets.teacher)

    def _dispatch(self, step: int, *, version: int) -> Batch:
        """Start the batch of update `step`: every group is scored the moment it is finished."""
        requests = [
            GenerateRequest(
                prompt=prompt,
                sampling=self.sampling[prompt.task],
                version=version,
                seed=derive_seed(self.seed, step, prompt.index, position),
            )
            for position, prompt in enumerate(self.prompts.batch(step))
        ]
        groups = self.fleets.rollout.generate(requests)
        return Batch(step=step, groups=groups, scores=self.fleets.teacher.score(groups, self.asked))
