"""Opens one pool alone, to measure what it does."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray
from ray.util.placement_group import remove_placement_group

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import Config, RolloutConfig, TeacherConfig
from opd_ray.config.services import ClusterConfig
from opd_ray.config.weight_sync import WeightSync
from opd_ray.protocol import Float32, Int32, Payload, RolloutFleet, ScoreRequest
from opd_ray.requests import ObjectiveIds
from opd_ray.routing import max_response_tokens
from workers.fleet import Berth, kill, spawn
from workers.learner.fleet import RayLearner
from workers.opening import learner_arguments
from workers.placement import Pool, check_capacity, connect, is_local, pools, shares_one_gpu
from workers.reference import ReferenceModel
from workers.reservation import reserve
from workers.rollout.fleet import RayRolloutFleet
from workers.teacher.fleet import RayTeacherFleet


@contextmanager
def teacher_sampler(
    config: Config, teacher: TeacherConfig, *, log_dir: Path, role: str = "teacher-sampler"
) -> Iterator[RolloutFleet]:
    """Start one rollout worker on a teacher's weights, to measure the teacher itself; it ends on leaving."""
    model = replace(config.rollout, num_workers=1, dtype=teacher.dtype, weight_sync=WeightSync.object_store)
    pool = replace(pools(config)["rollout"], num_workers=1)
    with _berth(config.cluster, role=role, pool=pool, log_dir=log_dir) as berth:
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
def model_sampler(
    path: str, *, rollout: RolloutConfig, cluster: ClusterConfig, max_model_tokens: int, log_dir: Path
) -> Iterator[RolloutFleet]:
    """Join or start a cluster and start rollout workers on a model, to measure it; all ends on leaving.

    Raises ValueError when there is no cluster or it is too small.
    """
    pool = Pool(
        key="num_workers",
        num_workers=rollout.num_workers,
        cpus_per_worker=rollout.cpus_per_worker,
        gpus_per_worker=rollout.gpus_per_worker,
    )
    connect(cluster)
    try:
        check_capacity([pool])
        with _berth(cluster, role="evaluator", pool=pool, log_dir=log_dir) as berth:
            fleet = RayRolloutFleet(
                model_path=path,
                config=replace(rollout, weight_sync=WeightSync.nccl),  # never joined; vLLM's own, its processes know it
                objective=ObjectiveConfig(kind=ObjectiveKind.sampled),
                max_model_tokens=max_model_tokens,
                berth=berth,
            )
            with _opened(fleet):
                yield fleet
    finally:
        ray.shutdown()


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
    with _berth(config.cluster, role=role, pool=pool, log_dir=log_dir) as berth:
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
    arguments = learner_arguments(
        config, teacher_paths=teacher_paths, vocab_size=vocab_size, ids=ObjectiveIds(masked=(), equivalent=())
    )
    with _berth(config.cluster, role="learner-alone", pool=pools(config)["learner"], log_dir=log_dir) as berth:
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
    with _berth(config.cluster, role="reference", pool=pool, log_dir=log_dir) as berth:
        (actor,) = spawn(ReferenceModel, berth=berth, arguments=arguments, concurrent=False)
        try:
            logprobs_N: Float32 = ray.get(actor.logprobs.remote(samples))
        finally:
            kill([actor])
    return logprobs_N


@contextmanager
def _opened(fleet: RayRolloutFleet | RayTeacherFleet | RayLearner) -> Iterator[None]:
    try:
        fleet.wait_ready()
        yield
    finally:
        fleet.close()


@contextmanager
def _berth(cluster: ClusterConfig, *, role: str, pool: Pool, log_dir: Path) -> Iterator[Berth]:
    """Reserve a place for one pool alone."""
    group = reserve([pool], timeout_s=cluster.placement_timeout_s)
    try:
        yield Berth(
            role=role,
            pool=pool,
            placement_group=group,
            one_bundle=shares_one_gpu([pool]),
            log_dir=log_dir,
            num_threads=cluster.threads_per_worker,
            local=is_local(cluster),
        )
    finally:
        remove_placement_group(group)
