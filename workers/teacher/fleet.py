"""The pool of teacher workers: a group's score is a function of its reference."""

from collections.abc import Iterable, Sequence
from typing import Any

import ray

from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.config.teacher import AlignmentKind, TeacherKind
from opd_ray.protocol import GroupHandle, Payload, ScoreHandle, ScoreRequest
from opd_ray.requests import check_offered, held_out_request, score_request
from workers.fleet import Berth, kill, spawn
from workers.teacher.actor import TeacherActor
from workers.teacher.http import check_request, offered


def check_teachers(config: Config, teachers: Iterable[TeacherConfig]) -> None:
    """Raise ValueError when a teacher cannot say what training and evaluation ask of it.

    A recording is not looked into here.
    """
    for teacher in teachers:
        if teacher.kind is TeacherKind.cache:
            continue
        if teacher.alignment is AlignmentKind.bytes and config.objective.equivalent_tokens:
            raise ValueError(
                f"objective.equivalent_tokens with {teacher.path}: a teacher with another tokenizer does not know these"
                " tokens; map them by teacher.token_map"
            )
        for request in (score_request(config.objective), held_out_request(config)):
            if request is not None:
                _check_request(teacher, request, temperature=config.rollout.temperature)


def _check_request(teacher: TeacherConfig, request: ScoreRequest, *, temperature: float) -> None:
    sayable = frozenset(Payload)  # a pooling engine gives hidden states, and from them everything
    if teacher.alignment is AlignmentKind.bytes:
        sayable = frozenset({Payload.sampled})
    if teacher.kind is TeacherKind.http:
        sayable &= offered(temperature)
    check_offered(request, offered=sayable, teacher=teacher.path)
    if teacher.kind is TeacherKind.http:
        check_request(request, temperature=temperature)


class RayTeacherFleet:
    """`TeacherFleet` on Ray actors."""

    def __init__(self, *, name: str, config: TeacherConfig, berth: Berth, arguments: dict[str, Any]) -> None:
        self._workers = spawn(TeacherActor, berth=berth, arguments={"config": config, **arguments}, concurrent=True)
        self._name = name
        self._num_dealt = 0

    def wait_ready(self) -> None:
        """Block until every engine is built."""
        ray.get([worker.ready.remote() for worker in self._workers])

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        """Dispatch scoring; return at once. Ray starts each call the moment its own group is finished."""
        return [self._score(group, request) for group in groups]

    def score_by_all(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[list[ScoreHandle]]:
        """Have every worker score the groups, to compare them; return at once, a list for each worker."""
        return [[self._ask(worker, group, request) for group in groups] for worker in self._workers]

    def close(self) -> None:
        """End the workers."""
        kill(self._workers)

    def _score(self, handle: GroupHandle, request: ScoreRequest) -> ScoreHandle:
        worker: Any = self._workers[self._num_dealt % len(self._workers)]
        self._num_dealt += 1
        return self._ask(worker, handle, request)

    def _ask(self, worker: Any, handle: GroupHandle, request: ScoreRequest) -> ScoreHandle:
        call = worker.score.options(num_returns=2)
        summary, score = call.remote(handle.group, request)
        return ScoreHandle(teacher=self._name, summary=summary, score=score)
