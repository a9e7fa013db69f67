"""The order in which engines and a learner on one GPU use its memory."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import Event, FakeLearner, FakeRollout, FakeTeacher, make_request
from ray.exceptions import RayError

from opd_ray.controller import Fleets
from opd_ray.protocol import Batch, GroupHandle, GroupSummary, Metrics, ScoreHandle, ScoreSummary
from workers.colocated import ColocatedLearner

ASLEEP = [("groups", 1), ("scores", 1), ("sleep", "rollout"), ("sleep", "teacher")]
AWAKE = [("release",), ("wake", "rollout"), ("wake", "teacher")]


@dataclass
class Rollout(FakeRollout):
    fault: Exception | None = None

    def summaries(self, groups: list[GroupHandle]) -> list[GroupSummary]:
        self.events.append(("groups", len(groups)))
        return []

    def sleep(self) -> None:
        self.events.append(("sleep", "rollout"))

    def wake(self) -> None:
        self.events.append(("wake", "rollout"))
        if self.fault:
            raise self.fault


@dataclass
class Teacher(FakeTeacher):
    changed: bool = False

    def summaries(self, scores: list[ScoreHandle]) -> list[ScoreSummary]:
        self.events.append(("scores", len(scores)))
        return []

    def sleep(self) -> None:
        self.events.append(("sleep", "teacher"))

    def wake(self) -> None:
        self.events.append(("wake", "teacher"))
        if self.changed:
            raise RayError("the teacher woke with other weights")


@dataclass
class Learner(FakeLearner):
    fault: Exception | None = None

    def update(self, batch: Batch) -> Metrics:
        learned = super().update(batch)
        if self.fault:
            raise self.fault
        return learned

    def release_memory(self) -> None:
        self.events.append(("release",))


def colocated(rollout: Rollout, teacher: Teacher, learner: Learner) -> ColocatedLearner:
    return ColocatedLearner(learner, rollout=rollout, teacher=teacher, teachers=[teacher])


def batch() -> Batch:
    groups = [GroupHandle(request=make_request(), summary=None, group=None)]
    return Batch(step=3, groups=groups, scores=[ScoreHandle(teacher="teacher", summary=None, score=None)])


def test_engines_sleep_once_the_scores_are_there_and_wake_before_the_weights_are_loaded():
    events: list[Event] = []
    rollout, teacher = Rollout(events), Teacher(events)
    learner = colocated(rollout, teacher, Learner(events))
    learned = learner.update(batch())
    Fleets(rollout=rollout, teacher=teacher, learner=learner).load(learner.publish(4))
    assert events == [*ASLEEP, ("learn", 3), *AWAKE, ("publish", 4), ("load", 4), ("follow", 4)]
    assert learner.version == 4
    assert learned["train/loss"] == 3
    assert min(learned["time/sleep_s"], learned["time/wake_s"]) >= 0


def test_a_failed_update_is_told_and_leaves_the_engines_awake():
    events: list[Event] = []
    learner = colocated(Rollout(events), Teacher(events), Learner(events, fault=RayError("out of memory")))
    with pytest.raises(RayError, match="out of memory"):
        learner.update(batch())
    assert events == [*ASLEEP, ("learn", 3), *AWAKE]


def test_a_failed_update_is_told_rather_than_engines_that_cannot_wake_after_it():
    events: list[Event] = []
    rollout = Rollout(events, fault=RayError("no memory to wake in"))
    learner = colocated(rollout, Teacher(events), Learner(events, fault=RayError("out of memory")))
    with pytest.raises(RayError, match="out of memory"):
        learner.update(batch())


def test_a_teacher_that_wakes_with_other_weights_ends_the_update():
    events: list[Event] = []
    learner = colocated(Rollout(events), Teacher(events, changed=True), Learner(events))
    with pytest.raises(RayError, match="other weights"):
        learner.update(batch())


def test_what_takes_no_update_is_the_learners_own_and_wakes_nobody(tmp_path: Path):
    events: list[Event] = []
    learner = colocated(Rollout(events), Teacher(events), Learner(events))
    assert learner.compare(batch()).kl == 2.25
    learner.save(str(tmp_path))
    learner.restore("there")
    learner.export("here")
    expected = [("compare", 3), ("save", str(tmp_path)), ("restore", "there"), ("export", "here")]
    assert events == expected
