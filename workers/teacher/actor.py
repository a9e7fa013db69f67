"""The actor of a teacher's pool: the kind of worker that the configuration asks for, with or without alignment."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any

from opd_ray.config.schema import TeacherConfig
from opd_ray.config.teacher import AlignmentKind, TeacherKind
from opd_ray.data.byte_aligner import ByteAligner
from opd_ray.protocol import Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from opd_ray.requests import follows_student
from workers.fault_plan import Phase, reach
from workers.lane import span_since
from workers.teacher.aligned import AlignedTeacher, Scorer
from workers.teacher.ema import EmaTeacher
from workers.teacher.errors import BadScore
from workers.teacher.http import HttpTeacherWorker
from workers.teacher.recorded import RecordedTeacher
from workers.teacher.score_checks import check_score
from workers.teacher.worker import TeacherWorker
from workers.weights import Buffers, WeightManifest

_LOG = logging.getLogger(__name__)
_MORE_TEACHER_TOKENS = 2  # room for a teacher whose tokenizer cuts the same text into more tokens


class TeacherActor:
    """Serves `score` calls concurrently."""

    def __init__(  # noqa: PLR0913 - what every kind of teacher must know of the run
        self,
        *,
        config: TeacherConfig,
        request: ScoreRequest,
        student_path: str,
        max_model_tokens: int,
        vocab_size: int,
        temperature: float,
        equivalent_ids: Sequence[Sequence[int]],
        deterministic: bool = False,
    ) -> None:
        aligned = config.alignment is AlignmentKind.bytes
        common: dict[str, Any] = {
            "max_model_tokens": max_model_tokens * (_MORE_TEACHER_TOKENS if aligned else 1),
            "vocab_size": _vocab_size(config.path) if aligned else vocab_size,
            "temperature": temperature,
            "equivalent_ids": equivalent_ids,
        }
        self._vocab_size = vocab_size
        # The last bits of a score depend on what shares the engine's steps: then nothing but the group itself.
        self._alone: AbstractAsyncContextManager[Any] = asyncio.Lock() if deterministic else nullcontext()
        # A recording's scores are found by the groups as they were sampled, with the student's prompts.
        self._is_recorded = config.kind is TeacherKind.cache
        self._scorer: Scorer
        self._engine: TeacherWorker | None = None  # None: none on this run's devices
        if config.kind is TeacherKind.http:
            assert config.http is not None
            self._scorer = HttpTeacherWorker(config=config.http, request=request, **common)
        elif config.kind is TeacherKind.cache:
            assert config.cache is not None
            self._scorer = RecordedTeacher(config.cache)
        else:
            self._engine = self._scorer = TeacherWorker(config=config, **common)
            if follows_student(config):
                self._scorer = EmaTeacher(self._engine, decay=config.self.ema_decay)
        if aligned:
            from transformers import AutoTokenizer

            student, teacher = (AutoTokenizer.from_pretrained(path) for path in (student_path, config.path))
            self._scorer = AlignedTeacher(
                self._scorer, aligner=ByteAligner(student, teacher, token_map=config.token_map)
            )

    async def ready(self) -> bool:
        """Answer once the teacher can score."""
        return await self._scorer.ready()

    async def score_all(self, request: ScoreRequest, *groups: TrajectoryGroup) -> list[ScoreSummary | Score | None]:
        """Answer several calls of `score` in one: what each returns, one after the other."""
        answers = await asyncio.gather(*(self.score(group, request) for group in groups))
        return [part for answer in answers for part in answer]

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score | None]:
        """Score every response token of a group, behind the prompt that the teacher is to read.

        For a group that cannot be scored the summary says why.
        """
        if not self._is_recorded:
            group = _as_teacher_reads(group)
        async with self._alone:
            start = time.time()
            reach(Phase.score, step=int(group.token_versions.max(initial=-1)))
            summary, score = await answered(self._scorer, group, request, vocab_size=self._vocab_size)
            return replace(summary, span=span_since(start)), score

    async def sleep(self) -> None:
        """Give the memory of the GPU back; no `score` may be under way. Without an engine there is none."""
        if self._engine is not None:
            await self._engine.sleep()

    async def wake(self) -> None:
        """Take the memory again. Raises RuntimeError when the weights are not the same."""
        if self._engine is not None:
            await self._engine.wake()

    async def follow(self, manifest: WeightManifest, buffers: Buffers) -> float:
        """Take a published version of the student into the average; return the seconds it took."""
        return await self._ema().follow(manifest, buffers)

    async def save(self, path: str) -> None:
        """Write the averaged weights to a safetensors file."""
        await self._ema().save(path)

    async def restore(self, path: str) -> None:
        """Take the averaged weights from a file that `save` has written."""
        await self._ema().restore(path)

    def _ema(self) -> EmaTeacher:
        assert isinstance(self._scorer, EmaTeacher)
        return self._scorer


def _as_teacher_reads(group: TrajectoryGroup) -> TrajectoryGroup:
    """Return the group with the teacher's prompt, where it has one of its own, for the student's."""
    if not len(group.teacher_prompt_ids):
        return group
    return replace(group, prompt_ids=group.teacher_prompt_ids, teacher_prompt_ids=group.teacher_prompt_ids[:0])


async def answered(
    scorer: Scorer, group: TrajectoryGroup, request: ScoreRequest, *, vocab_size: int
) -> tuple[ScoreSummary, Score | None]:
    """Return a scorer's answer, checked; what is wrong with a group or its score becomes the summary's fault."""
    start = time.perf_counter()
    try:
        summary, score = await scorer.score(group, request)
        await asyncio.to_thread(check_score, score, group, request, vocab_size=vocab_size)
    except ValueError as error:  # a BadScore, or engine or aligner refuse the sequence
        _LOG.warning("prompt %d: %s", group.prompt_index, error, exc_info=not isinstance(error, BadScore))
        score_s = time.perf_counter() - start
        return ScoreSummary(num_tokens=0, num_bytes=0, dropped_mass_sum=0.0, score_s=score_s, fault=str(error)), None
    return summary, score


def _vocab_size(path: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size)
