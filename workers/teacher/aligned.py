"""A teacher with another tokenizer: any worker behind it, given the student's text in the teacher's tokens."""

import asyncio
from dataclasses import replace
from typing import Protocol

import numpy as np

from opd_ray.data.byte_aligner import ByteAligner, TeacherGroup
from opd_ray.protocol import SampledScore, Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from workers.teacher.messages import num_bytes
from workers.teacher.score_checks import check_score


class Scorer(Protocol):
    """What every teacher worker is."""

    async def ready(self) -> bool:
        """Answer once it can score."""

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group."""


class AlignedTeacher:
    """Serves `sampled` payloads: spans of text that both tokenizers bound, compared by their log-probs."""

    def __init__(self, scorer: Scorer, *, aligner: ByteAligner) -> None:
        self._scorer = scorer
        self._aligner = aligner

    async def ready(self) -> bool:
        """Answer once the teacher behind it can score."""
        return await self._scorer.ready()

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score the group's text; tokens whose span the teacher cannot read are not valid."""
        read = await asyncio.to_thread(self._aligner.to_teacher, group)
        of_teacher = _in_teachers_tokens(group, read)
        summary, score = await self._scorer.score(of_teacher, request)
        check_score(score, of_teacher, request)  # now, before its values are summed
        assert isinstance(score, SampledScore)
        given = read.to_student(score.logprobs_N, group=group)
        of_student = SampledScore(logprobs_N=given.logprobs_N, valid_N=given.valid_N)
        return replace(summary, num_tokens=len(given.logprobs_N), num_bytes=num_bytes(of_student)), of_student


def _in_teachers_tokens(group: TrajectoryGroup, read: TeacherGroup) -> TrajectoryGroup:
    num_tokens = len(read.response_ids)
    return replace(
        group,
        prompt_ids=read.prompt_ids,
        response_ids=read.response_ids,
        offsets=read.offsets,
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        token_versions=np.zeros(num_tokens, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
    )
