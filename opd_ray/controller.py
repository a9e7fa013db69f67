"""The loop of on-policy distillation: schedules the fleets, passes references, never touches a token."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from opd_ray.protocol import Learner, Metrics, RolloutFleet, TeacherFleet, WeightBundle
from opd_ray.schedule import Schedule
from opd_ray.services import Checkpoints, Evaluator, Screen, Tracker, Window


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
    fleets: Fleets
    window: Window
    screen: Screen
    evaluator: Evaluator
    checkpoints: Checkpoints
    tracker: Tracker
    stoppable: Callable[[], AbstractContextManager[object]] = nullcontext  # where a run that is told to end is left

    def run(self, step: int = 0) -> None:
        """Train from update `step` to the last: generate, score, screen, learn, publish."""
        fleets, schedule, window, tracker = self.fleets, self.schedule, self.window, self.tracker
        fleets.load(fleets.learner.publish(step))
        if schedule.is_eval(step) and not tracker.holds(step):
            tracker.log(step, self.evaluator.evaluate(step))
        while step < schedule.num_steps:
            with self.stoppable():
                window.fill(step)
                batch, taken = window.take(step)
                batch, screened = self.screen.whole(batch)
            tracker.passed("wait")
            learned = fleets.learner.update(batch)
            tracker.passed("learn")
            window.release()
            step += 1
            loaded = fleets.load(fleets.learner.publish(step))
            tracker.passed("publish")
            evaluated = self.evaluator.evaluate(step) if schedule.is_eval(step) else {}
            tracker.log(
                step,
                {**taken, **screened, **learned, **loaded, **evaluated},
                fleets.rollout.summaries(batch.groups),
                fleets.teacher.summaries(batch.scores),
            )
            if schedule.is_save(step):
                self.checkpoints.save(step, fleets.learner, fleets.teacher, window)
