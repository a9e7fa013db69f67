"""The actor of a teacher's pool: the kind of worker that the configuration asks for, with or without alignment."""

from collections.abc import Sequence
from typing import Any

from opd_ray.config.schema import TeacherConfig
from opd_ray.config.teacher import AlignmentKind, TeacherKind
from opd_ray.data.byte_aligner import ByteAligner
from opd_ray.protocol import Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from workers.teacher.aligned import AlignedTeacher, Scorer
from workers.teacher.http import HttpTeacherWorker
from workers.teacher.recorded import RecordedTeacher
from workers.teacher.worker import TeacherWorker

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
    ) -> None:
        aligned = config.alignment is AlignmentKind.bytes
        common: dict[str, Any] = {
            "max_model_tokens": max_model_tokens * (_MORE_TEACHER_TOKENS if aligned else 1),
            "vocab_size": _vocab_size(config.path) if aligned else vocab_size,
            "temperature": temperature,
            "equivalent_ids": equivalent_ids,
        }
        self._scorer: Scorer
        if config.kind is TeacherKind.http:
            assert config.http is not None
            self._scorer = HttpTeacherWorker(config=config.http, request=request, **common)
        elif config.kind is TeacherKind.cache:
            assert config.cache is not None
            self._scorer = RecordedTeacher(config.cache)
        else:
            self._scorer = TeacherWorker(config=config, **common)
        if aligned:
            from transformers import AutoTokenizer

            student, teacher = (AutoTokenizer.from_pretrained(path) for path in (student_path, config.path))
            self._scorer = AlignedTeacher(
                self._scorer, aligner=ByteAligner(student, teacher, token_map=config.token_map)
            )

    async def ready(self) -> bool:
        """Answer once the teacher can score."""
        return await self._scorer.ready()

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group."""
        return await self._scorer.score(group, request)


def _vocab_size(path: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size)
