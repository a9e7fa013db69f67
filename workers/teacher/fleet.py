"""The pool of teacher workers: a group's score is a function of its reference."""

from collections.abc import Iterable, Sequence
from typing import Any

from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.config.teacher import AlignmentKind, TeacherKind
from opd_ray.protocol import (
    CannotGoOn,
    GroupHandle,
    Metrics,
    Payload,
    Ref,
    ScoreHandle,
    ScoreRequest,
    ScoreSummary,
    WeightBundle,
)
from opd_ray.requests import check_offered, follows_student, held_out_request, score_request
from workers.fleet import Berth, in_calls, kill, spawn
from workers.placement import teacher_role
from workers.teacher.actor import TeacherActor
from workers.teacher.errors import TeacherDown
from workers.teacher.http import check_request, offered
from workers.waiting import answers


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
    if follows_student(teacher) and request.payload is Payload.hidden:
        raise ValueError(
            "teacher.self.update=ema: the learner would need the head of every version for the teacher's hidden states,"
            " which objective=full and objective.baseline=kl ask for; use objective=support, objective=sampled without"
            " that baseline, or teacher.self.update=frozen"
        )
    check_offered(request, offered=sayable, teacher=teacher.path)
    if teacher.kind is TeacherKind.http:
        check_request(request, temperature=temperature)


class RayTeacherFleet:
    """`TeacherFleet` on Ray actors."""

    def __init__(  # noqa: PLR0913 - what a pool of workers depends on
        self,
        *,
        name: str,
        config: TeacherConfig,
        berth: Berth,
        arguments: dict[str, Any],
        groups_per_call: int = 1,
        max_restarts: int = 0,
        worker_class: type = TeacherActor,
    ) -> None:
        """max_restarts: how often each worker is started anew; 0 for one whose weights change."""
        self._workers = spawn(
            worker_class,
            berth=berth,
            arguments={"config": config, **arguments},
            concurrent=True,
            max_restarts=max_restarts,
        )
        self._name = name
        self._follows = follows_student(config)
        self._groups_per_call = groups_per_call
        self._num_dealt = 0

    @property
    def workers(self) -> Sequence[Any]:
        """Return the actors."""
        return self._workers

    def wait_ready(self) -> None:
        """Block until every worker can score. Raises CannotGoOn when no server of a teacher comes up."""
        self._get([worker.ready.remote() for worker in self._workers])

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        """Dispatch scoring; return at once. Ray starts each call the moment its own groups are finished."""
        calls = in_calls(groups, self._groups_per_call, num_workers=len(self._workers))
        return [score for of_call in calls for score in self._ask(self._next_worker(), of_call, request)]

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        """Wait for scores and return their summaries, in order. Raises CannotGoOn when the teacher is gone."""
        return self._get([score.summary for score in scores])

    def score_by_all(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[list[ScoreHandle]]:
        """Have every worker score the groups, to compare them; return at once, a list for each worker."""
        return [self._ask(worker, groups, request) for worker in self._workers]

    def follow(self, weights: WeightBundle) -> Metrics:
        """Have every worker take a new version of the student into its average; blocks until all hold it."""
        if not self._follows:
            return {}
        seconds = answers([worker.follow.remote(weights.manifest, weights.buffer) for worker in self._workers])
        return {"time/teacher_load_s": max(seconds)}

    def save(self, folder: str) -> None:
        """Write the averaged weights, which all workers share."""
        if self._follows:
            answers(self._workers[0].save.remote(self._state_file(folder)))

    def restore(self, folder: str) -> None:
        """Give every worker the averaged weights of a checkpoint."""
        if self._follows:
            answers([worker.restore.remote(self._state_file(folder)) for worker in self._workers])

    def sleep(self) -> None:
        """Have every worker give its GPU's memory back; all that was asked must be answered."""
        answers([worker.sleep.remote() for worker in self._workers])

    def wake(self) -> None:
        """Have every worker take its memory again and look at its weights."""
        answers([worker.wake.remote() for worker in self._workers])

    def close(self) -> None:
        """End the workers."""
        kill(self._workers)

    def _get(self, refs: Sequence[Ref]) -> list[Any]:
        try:
            return answers(list(refs))
        except TeacherDown as error:  # Ray raises it with the worker's traceback for a message
            raise CannotGoOn(f"{self._name}: {getattr(error, 'cause', error)}") from None

    def _state_file(self, folder: str) -> str:
        return f"{folder}/{teacher_role(self._name)}.safetensors"

    def _next_worker(self) -> Any:
        self._num_dealt += 1
        return self._workers[(self._num_dealt - 1) % len(self._workers)]

    def _ask(self, worker: Any, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        call = worker.score_all.options(num_returns=2 * len(groups))
        refs = call.remote(request, *(group.group for group in groups))
        return [ScoreHandle(teacher=self._name, summary=s, score=t) for s, t in zip(refs[::2], refs[1::2], strict=True)]
