"""A group that cannot be scored is an answer of the actor like any other; the fleet tells a teacher that is gone."""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from groups import make_group

from opd_ray.protocol import Payload, SampledScore, Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from workers.teacher.actor import answered
from workers.teacher.errors import BadScore, TeacherDown

GROUP = make_group([1, 2], [3, 4])
ASKED = ScoreRequest(payload=Payload.sampled)


@dataclass
class Teacher:
    """Says one thing, or fails."""

    logprobs: tuple[float, ...] = (-1.0, -2.0)
    fault: Exception | None = None

    async def ready(self) -> bool:
        return True

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        if self.fault is not None:
            raise self.fault
        assert group is GROUP
        assert request is ASKED
        score = SampledScore(logprobs_N=np.array(self.logprobs, dtype=np.float32))
        return ScoreSummary(num_tokens=2, num_bytes=8, dropped_mass_sum=0.0, score_s=0.5), score


def ask(**teacher: Any) -> tuple[ScoreSummary, Score | None]:
    return asyncio.run(answered(Teacher(**teacher), GROUP, ASKED, vocab_size=10))


def test_a_sound_score_comes_as_the_teacher_gave_it():
    summary, score = ask()
    assert summary == ScoreSummary(num_tokens=2, num_bytes=8, dropped_mass_sum=0.0, score_s=0.5, fault="")
    assert isinstance(score, SampledScore)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"fault": BadScore("the server answered 400")}, "the server answered 400"),
        ({"fault": ValueError("the prompt is longer than the model")}, "the prompt is longer than the model"),
        ({"logprobs": (-1.0, float("nan"))}, "response token 1: the teacher gave a log-prob of the sampled token"),
        ({"logprobs": (-1.0,)}, "the teacher gave 1 log-probs, expected 2"),
    ],
)
def test_a_group_that_cannot_be_scored_has_a_fault_and_no_score(teacher: dict[str, Any], words: str):
    summary, score = ask(**teacher)
    assert words in summary.fault
    assert score is None
    assert (summary.num_tokens, summary.num_bytes) == (0, 0)
    assert summary.score_s >= 0


def test_a_teacher_that_is_gone_and_a_fault_of_the_program_are_not_the_groups():
    for fault in (TeacherDown("all servers are gone"), RuntimeError("a bug")):
        with pytest.raises(type(fault)):
            ask(fault=fault)
