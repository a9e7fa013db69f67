"""Opens all pools of a run: their places, their workers, what they tell one another before the first step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ray.util.placement_group import remove_placement_group

from opd_ray.config.schema import Config
from opd_ray.config.weight_sync import WeightSync
from opd_ray.controller import Fleets
from opd_ray.requests import ObjectiveIds, follows_student, head_is_read, score_request
from opd_ray.routing import max_response_tokens, teachers_of
from opd_ray.weight_sync import chosen_sync
from workers.colocated import ColocatedLearner
from workers.fleet import Berth
from workers.health import starting, watched
from workers.learner.fleet import RayLearner
from workers.learner.objective import ObjectiveSetup
from workers.learner.worker import LearnerWorker
from workers.placement import is_local, pools, shares_one_gpu, teacher_role
from workers.reservation import reserve
from workers.rollout.fleet import RayRolloutFleet
from workers.rollout.worker import RolloutWorker
from workers.sync.choose import SyncPlan
from workers.teacher.actor import TeacherActor
from workers.teacher.fleet import RayTeacherFleet
from workers.teacher.routed import RoutedTeachers
from workers.waiting import waiting_at_most

_MORE_S = 60.0  # a collective call is given up after whoever waits for its rank has given that up
_Fleet = TypeVar("_Fleet", RayRolloutFleet, RayTeacherFleet, RayLearner)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerClasses:
    """What the pools are made of; tests put slower ones in their place."""

    rollout: type = RolloutWorker
    teacher: type = TeacherActor
    learner: type = LearnerWorker


@contextmanager
def open_fleets(  # noqa: PLR0913 - what a run is made of, and whom it tells
    config: Config,
    *,
    vocab_size: int,
    ids: ObjectiveIds,
    prompt_tokens: Mapping[str, int],
    log_dir: Path,
    classes: WorkerClasses = WorkerClasses(),
    restarted: Callable[[str], None] = lambda _: None,
) -> Iterator[Fleets]:
    """Start all workers, wait until they are ready, and end them on leaving.

    prompt_tokens: of the longest prompt that each teacher reads, by its name. restarted: is told, on another thread,
    the name of a worker that was started anew in its place while the others went on.
    """
    with ExitStack() as stack:
        berths = _berths(config, log_dir=log_dir)
        # It also ends the workers that lie in it, should not all pools come to be.
        stack.callback(remove_placement_group, berths["rollout"].placement_group)
        with starting(), waiting_at_most(config.fault.start_timeout_s):
            rollout = _rollout(config, berth=berths["rollout"], worker_class=classes.rollout)
            teachers = _teachers(
                config,
                berths=berths,
                vocab_size=vocab_size,
                ids=ids,
                prompt_tokens=prompt_tokens,
                worker_class=classes.teacher,
            )
            learner = RayLearner(
                config=config.learner,
                berth=berths["learner"],
                arguments=learner_arguments(config, teacher_paths=_heads_read(config), vocab_size=vocab_size, ids=ids),
                async_save=config.async_save,
                worker_class=classes.learner,
            )
            fleets: list[RayRolloutFleet | RayTeacherFleet | RayLearner] = [rollout, *teachers.values(), learner]
            for fleet in fleets:
                stack.callback(fleet.close)
            for fleet in fleets:
                fleet.wait_ready()
            learner.connect(rollout.workers)
        workers = {f"{role}-{i}": worker for role, i, worker in _named(rollout, teachers, learner)}
        fault = config.fault
        with (
            watched(workers, hang_timeout_s=fault.hang_timeout_s, catch_up=rollout.catch_up, restarted=restarted),
            waiting_at_most(fault.call_timeout_s),
        ):
            yield _fleets(config, rollout=rollout, teachers=teachers, learner=learner)


def _heads_read(config: Config) -> dict[str, str]:
    """Return the paths of the teachers whose heads the learner reads, by name."""
    by_name = teachers_of(config).by_name
    return {name: teacher.path for name, teacher in by_name.items() if head_is_read(config, teacher)}


def _named(
    rollout: RayRolloutFleet, teachers: Mapping[str, RayTeacherFleet], learner: RayLearner
) -> Iterator[tuple[str, int, Any]]:
    """Yield every worker with its role and its place in the pool."""
    pools = {"rollout": rollout.workers, "learner": learner.ranks}
    for role, of_pool in {**pools, **{teacher_role(name): fleet.workers for name, fleet in teachers.items()}}.items():
        for index, worker in enumerate(of_pool):
            yield role, index, worker


def _rollout(config: Config, *, berth: Berth, worker_class: type) -> RayRolloutFleet:
    fleet = RayRolloutFleet(
        model_path=config.student.path,
        config=replace(config.rollout, weight_sync=chosen_sync(config)),
        max_model_tokens=config.data.max_prompt_tokens + max_response_tokens(config),
        berth=berth,
        objective=config.objective,
        lora=config.student.lora.wanted,
        deterministic=config.deterministic,
        max_restarts=config.fault.max_restarts if _can_restart(config, berth=berth) else 0,
        worker_class=worker_class,
    )
    return _in_turn(fleet, berth=berth)


def _can_restart(config: Config, *, berth: Berth) -> bool:
    """Whether a rollout worker can be started anew beside the others.

    Not where it is in a group with the learner, where the order of all that its engine has done matters, or where
    engines that share its GPU would have to make room.
    """
    in_object_store = chosen_sync(config) is WeightSync.object_store
    return in_object_store and not config.deterministic and not berth.one_bundle


def _teachers(
    config: Config,
    *,
    berths: Mapping[str, Berth],
    vocab_size: int,
    ids: ObjectiveIds,
    prompt_tokens: Mapping[str, int],
    worker_class: type,
) -> dict[str, RayTeacherFleet]:
    arguments = {
        "request": score_request(config.objective),
        "student_path": config.student.path,
        "vocab_size": vocab_size,
        "temperature": config.rollout.temperature,
        "equivalent_ids": ids.equivalent,
        "deterministic": config.deterministic,
    }
    response_tokens = max_response_tokens(config)
    fleets = {}
    for name, teacher in teachers_of(config).by_name.items():
        berth = berths[teacher_role(name)]
        fleet = RayTeacherFleet(
            name=name,
            config=teacher,
            berth=berth,
            arguments={**arguments, "max_model_tokens": prompt_tokens[name] + response_tokens},
            groups_per_call=config.rollout.groups_per_call,
            max_restarts=0 if follows_student(teacher) or berth.one_bundle else config.fault.max_restarts,
            worker_class=worker_class,
        )
        fleets[name] = _in_turn(fleet, berth=berth)
    return fleets


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


def learner_arguments(
    config: Config, *, teacher_paths: Mapping[str, str], vocab_size: int, ids: ObjectiveIds
) -> dict[str, Any]:
    """Return what a rank is built from. teacher_paths: whose heads it reads, by name."""
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
        "sync": SyncPlan.of(config),
        "collective_timeout_s": config.fault.call_timeout_s + _MORE_S,
    }


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
