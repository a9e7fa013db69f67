"""The Ray actors; the only home of vLLM and DeepSpeed. `open_fleets` is the door of a run; the others open one pool."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import remove_placement_group

from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.controller import Fleets
from opd_ray.protocol import Float32, Int32, Payload, RolloutFleet, ScoreRequest
from opd_ray.requests import ObjectiveIds, head_is_read, score_request
from opd_ray.routing import max_response_tokens, teachers_of
from workers.colocated import ColocatedLearner
from workers.fleet import Berth, kill, spawn
from workers.learner.fleet import RayLearner
from workers.learner.objective import ObjectiveSetup
from workers.learner.worker import LearnerWorker
from workers.placement import (
    Pool,
    capacity,
    check_capacity,
    connect,
    is_local,
    pools,
    shares_one_gpu,
    teacher_role,
    totals,
)
from workers.reference import ReferenceModel
from workers.reservation import reserve, told_to
from workers.rollout.fleet import RayRolloutFleet
from workers.rollout.worker import RolloutWorker
from workers.scores import check_replay, head_keys, training_fleets
from workers.teacher.actor import TeacherActor
from workers.teacher.fleet import RayTeacherFleet, check_teachers
from workers.teacher.routed import RoutedTeachers

__all__ = [
    "WorkerClasses",
    "capacity",
    "check_replay",
    "check_teachers",
    "connected",
    "head_keys",
    "is_local",
    "learner_alone",
    "open_fleets",
    "pools",
    "reference_logprobs",
    "teacher_sampler",
    "teacher_scorer",
    "totals",
    "training_fleets",
]

_Fleet = TypeVar("_Fleet", RayRolloutFleet, RayTeacherFleet, RayLearner)


@contextmanager
def connected(config: Config, say: Callable[[str], None] = lambda _: None) -> Iterator[str | None]:
    """Join or start the Ray cluster, check that the run fits it, and leave it at the end; yields its dashboard's URL.

    say: takes a line now and then while workers wait for their place. Raises ValueError when there is no cluster or it
    is too small and may not grow.
    """
    dashboard_url = connect(config.cluster)
    try:
        if not config.cluster.may_grow:
            check_capacity(list(pools(config).values()))
        with told_to(say):
            yield dashboard_url
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerClasses:
    """What the pools are made of; tests put slower ones in their place."""

    rollout: type = RolloutWorker
    teacher: type = TeacherActor
    learner: type = LearnerWorker


@contextmanager
def open_fleets(
    config: Config,
    *,
    vocab_size: int,
    ids: ObjectiveIds,
    prompt_tokens: Mapping[str, int],
    log_dir: Path,
    classes: WorkerClasses = WorkerClasses(),
) -> Iterator[Fleets]:
    """Start all workers, wait until they are ready, and end them on leaving.

    prompt_tokens: of the longest prompt that each teacher reads, by its name.
    """
    berths = _berths(config, log_dir=log_dir)
    teachers = teachers_of(config)
    response_tokens = max_response_tokens(config)
    rollout = _in_turn(
        RayRolloutFleet(
            model_path=config.student.path,
            config=config.rollout,
            max_model_tokens=config.data.max_prompt_tokens + response_tokens,
            berth=berths["rollout"],
            objective=config.objective,
            lora=config.student.lora.wanted,
            deterministic=config.deterministic,
            worker_class=classes.rollout,
        ),
        berth=berths["rollout"],
    )
    teacher_arguments = {
        "request": score_request(config.objective),
        "student_path": config.student.path,
        "vocab_size": vocab_size,
        "temperature": config.rollout.temperature,
        "equivalent_ids": ids.equivalent,
        "deterministic": config.deterministic,
    }
    teacher_fleets = {
        name: _in_turn(
            RayTeacherFleet(
                name=name,
                config=t,
                berth=berths[teacher_role(name)],
                arguments={**teacher_arguments, "max_model_tokens": prompt_tokens[name] + response_tokens},
                worker_class=classes.teacher,
            ),
            berth=berths[teacher_role(name)],
        )
        for name, t in teachers.by_name.items()
    }
    learner = RayLearner(
        config=config.learner,
        berth=berths["learner"],
        arguments=_learner_arguments(
            config,
            teacher_paths={name: t.path for name, t in teachers.by_name.items() if head_is_read(config, t)},
            vocab_size=vocab_size,
            ids=ids,
        ),
        worker_class=classes.learner,
    )
    fleets: list[RayRolloutFleet | RayTeacherFleet | RayLearner] = [rollout, *teacher_fleets.values(), learner]
    try:
        for fleet in fleets:
            fleet.wait_ready()
        yield _fleets(config, rollout=rollout, teachers=teacher_fleets, learner=learner)
    finally:
        for fleet in fleets:
            fleet.close()
        remove_placement_group(berths["rollout"].placement_group)


def _in_turn(fleet: _Fleet, *, berth: Berth) -> _Fleet:
    """Wait for a fleet that shares its GPU: vLLM measures what is free of it, which must not change meanwhile."""
    if berth.one_bundle:
        fleet.wait_ready()
    return fleet


def _fleets(
    config: Config, *, rollout: RayRolloutFleet, teachers: Mapping[str, RayTeacherFleet], learner: RayLearner
) -> Fleets:
    """Return the pools as the loop sees them."""
    teacher = RoutedTeachers(teachers, teachers_of(config))
    if not config.cluster.sleep:
        return Fleets(rollout=rollout, teacher=teacher, learner=learner)
    colocated = ColocatedLearner(learner, rollout=rollout, teacher=teacher, teachers=list(teachers.values()))
    return Fleets(rollout=rollout, teacher=teacher, learner=colocated)


@contextmanager
def teacher_sampler(
    config: Config, teacher: TeacherConfig, *, log_dir: Path, role: str = "teacher-sampler"
) -> Iterator[RolloutFleet]:
    """Start one rollout worker on a teacher's weights, to measure the teacher itself; it ends on leaving."""
    model = replace(config.rollout, num_workers=1, dtype=teacher.dtype)
    pool = replace(pools(config)["rollout"], num_workers=1)
    with _berth(config, role=role, pool=pool, log_dir=log_dir) as berth:
        fleet = RayRolloutFleet(
            model_path=teacher.path,
            config=model,
            objective=config.objective,
            max_model_tokens=config.data.max_prompt_tokens + max_response_tokens(config),
            berth=berth,
        )
        with _opened(fleet):
            yield fleet


@contextmanager
def teacher_scorer(
    config: Config, teacher: TeacherConfig, *, log_dir: Path, role: str, vocab_size: int, temperature: float
) -> Iterator[RayTeacherFleet]:
    """Start all workers of one teacher and nothing else, to measure the teacher itself; they end on leaving.

    Ids that the objective counts as one are told apart.
    """
    pool = Pool(
        key="teacher.num_workers",
        num_workers=teacher.num_workers,
        cpus_per_worker=teacher.cpus_per_worker,
        gpus_per_worker=teacher.gpus_per_worker,
    )
    arguments = {
        "request": ScoreRequest(payload=Payload.sampled),
        "student_path": config.student.path,
        "max_model_tokens": config.data.max_prompt_tokens + max_response_tokens(config),
        "vocab_size": vocab_size,
        "temperature": temperature,
        "equivalent_ids": (),
    }
    with _berth(config, role=role, pool=pool, log_dir=log_dir) as berth:
        fleet = RayTeacherFleet(name=role, config=teacher, berth=berth, arguments=arguments)
        with _opened(fleet):
            yield fleet


@contextmanager
def learner_alone(
    config: Config, *, teacher_paths: Mapping[str, str], vocab_size: int, log_dir: Path
) -> Iterator[RayLearner]:
    """Start the learner's ranks and nothing else; they end on leaving. teacher_paths: whose heads they read, by name.

    Ids that the objective masks or counts as one are as others.
    """
    arguments = _learner_arguments(
        config, teacher_paths=teacher_paths, vocab_size=vocab_size, ids=ObjectiveIds(masked=(), equivalent=())
    )
    with _berth(config, role="learner-alone", pool=pools(config)["learner"], log_dir=log_dir) as berth:
        learner = RayLearner(config=config.learner, berth=berth, arguments=arguments)
        with _opened(learner):
            yield learner


def reference_logprobs(
    config: Config, teacher: TeacherConfig, samples: Sequence[tuple[Int32, Int32]], *, vocab_size: int, log_dir: Path
) -> Float32:
    """Return what a teacher's checkpoint itself says of response tokens, [N]: pairs of prompt and response ids."""
    pool = Pool(
        key="teacher.cpus_per_worker", num_workers=1, cpus_per_worker=teacher.cpus_per_worker, gpus_per_worker=0.0
    )
    arguments = {"path": teacher.path, "vocab_size": vocab_size, "temperature": config.rollout.temperature}
    with _berth(config, role="reference", pool=pool, log_dir=log_dir) as berth:
        (actor,) = spawn(ReferenceModel, berth=berth, arguments=arguments, concurrent=False)
        try:
            logprobs_N: Float32 = ray.get(actor.logprobs.remote(samples))
        finally:
            kill([actor])
    return logprobs_N


def _learner_arguments(
    config: Config, *, teacher_paths: Mapping[str, str], vocab_size: int, ids: ObjectiveIds
) -> dict[str, Any]:
    return {
        "student_path": config.student.path,
        "teacher_paths": teacher_paths,
        "objective": ObjectiveSetup(
            config=config.objective,
            ids=ids,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            vocab_size=vocab_size,
            loss_weights={task: special.loss_weight for task, special in config.tasks.items()},
        ),
        "num_steps": config.num_steps,
        "deterministic": config.deterministic,
        "lora": config.student.lora.wanted,
    }


@contextmanager
def _opened(fleet: RayRolloutFleet | RayTeacherFleet | RayLearner) -> Iterator[None]:
    try:
        fleet.wait_ready()
        yield
    finally:
        fleet.close()


@contextmanager
def _berth(config: Config, *, role: str, pool: Pool, log_dir: Path) -> Iterator[Berth]:
    """Reserve a place for one pool alone."""
    group = reserve([pool], timeout_s=config.cluster.placement_timeout_s)
    try:
        yield Berth(
            role=role,
            pool=pool,
            placement_group=group,
            one_bundle=shares_one_gpu([pool]),
            log_dir=log_dir,
            num_threads=config.cluster.threads_per_worker,
            local=is_local(config.cluster),
        )
    finally:
        remove_placement_group(group)


def _berths(config: Config, *, log_dir: Path) -> dict[str, Berth]:
    """Reserve a place for every worker of every pool, all or none."""
    by_role = pools(config)
    shared = shares_one_gpu(list(by_role.values()))
    group: Any = reserve(list(by_role.values()), timeout_s=config.cluster.placement_timeout_s)
    berths, first_bundle = {}, 0
    for role, pool in by_role.items():
        berths[role] = Berth(
            role=role,
            pool=pool,
            placement_group=group,
            first_bundle=first_bundle,
            one_bundle=shared,
            log_dir=log_dir,
            num_threads=config.cluster.threads_per_worker,
            local=is_local(config.cluster),
        )
        first_bundle += 0 if shared else pool.num_workers
    return berths
