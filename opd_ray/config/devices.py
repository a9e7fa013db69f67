"""Rules over the devices of the pools: whole GPUs, parts of one, and engines that sleep beside the learner."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_ray.config.schema import Config
from opd_ray.config.teacher import TeacherKind
from opd_ray.routing import teacher_key, teachers_of

_ENGINE_KINDS = {TeacherKind.vllm, TeacherKind.self}
_ENABLE, _UTILISATION, _KV_BYTES = "enable_sleep_mode", "gpu_memory_utilization", "kv_cache_memory_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """A pool of rollout or teacher workers."""

    key: str
    has_engine: bool
    num_workers: int
    gpus_per_worker: float
    engine_args: Mapping[str, Any]


def check_devices(config: Config) -> None:
    """Raise ValueError for GPU shares that cannot work, and for sleep where engines cannot or are never idle."""
    learner = config.learner
    _require(
        learner.gpus_per_rank == 0 or 0 < learner.gpus_per_rank <= 1,
        f"learner.gpus_per_rank={learner.gpus_per_rank}: expected 0, 1 or a part of a GPU between them; more GPUs are"
        " more ranks (learner.num_ranks)",
    )
    _require(
        not 0 < learner.gpus_per_rank <= 0.5 or learner.num_ranks == 1,
        f"learner.gpus_per_rank={learner.gpus_per_rank} with learner.num_ranks={learner.num_ranks}: expected one rank;"
        " NCCL does not connect two on the same GPU",
    )
    if config.cluster.sleep:
        _sleep(config)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _sleep(config: Config) -> None:
    _require(
        config.max_staleness == 0,
        f"cluster.sleep=true with max_staleness={config.max_staleness}: engines that work ahead are never idle;"
        " expected max_staleness=0 or cluster.sleep=false",
    )
    _require(
        not config.deterministic,
        "cluster.sleep=true with deterministic=true: engines may hold requests back for their next fixed batch, so that"
        " they are not idle; expected one of the two to be false",
    )
    pools, learner = _pools(config), config.learner
    engines = [pool for pool in pools if pool.has_engine]
    sharing = {f"{e.key}.gpus_per_worker": e.gpus_per_worker for e in engines}
    for key, share in {**sharing, "learner.gpus_per_rank": learner.gpus_per_rank}.items():
        _require(
            0 < share < 1,
            f"cluster.sleep=true with {key}={share:g}: vLLM engines sleep on a GPU that they share with the learner;"
            " expected a part of a GPU, as cluster=one_gpu gives, or cluster.sleep=false",
        )
    for e in engines:
        _require(
            e.num_workers == 1,
            f"cluster.sleep=true with {e.key}.num_workers={e.num_workers}: expected 1, one engine fills its part of the"
            " GPU as well as several",
        )
        _require(
            e.engine_args.get(_ENABLE) is True,
            f"cluster.sleep=true with {e.key}.engine_args.{_ENABLE}={e.engine_args.get(_ENABLE)}: expected true, an"
            " engine that may sleep starts so",
        )
    words = ", ".join(f"{p.key}.gpus_per_worker={p.gpus_per_worker:g}" for p in pools)
    total = sum(p.num_workers * p.gpus_per_worker for p in pools) + learner.num_ranks * learner.gpus_per_rank
    _require(
        round(total, 4) <= 1,
        f"cluster.sleep=true with {words}, learner.gpus_per_rank={learner.gpus_per_rank:g}: expected at most 1 in all,"
        " they share one GPU",
    )
    _memory(engines)


def _memory(engines: list[_Pool]) -> None:
    """Each engine takes a part of the whole GPU, 0.92 when none is given, and keeps to it whoever else is there."""
    parts: dict[str, float] = {}
    for e in engines:
        if e.engine_args.get(_KV_BYTES):
            continue
        key = f"{e.key}.engine_args.{_UTILISATION}"
        _require(_UTILISATION in e.engine_args, f"{key} is not given: expected this engine's part of the GPU's memory")
        parts[key] = e.engine_args[_UTILISATION]
    words = " and ".join(f"{key}={part}" for key, part in parts.items())
    _require(sum(parts.values()) < 1, f"{words}: expected less than 1 together, the learner needs the rest")


def _pools(config: Config) -> list[_Pool]:
    rollout = config.rollout
    return [
        _Pool(
            key="rollout",
            has_engine=True,
            num_workers=rollout.num_workers,
            gpus_per_worker=rollout.gpus_per_worker,
            engine_args=rollout.engine_args,
        ),
        *(
            _Pool(
                key=teacher_key(name).removesuffix(".path"),
                has_engine=teacher.kind in _ENGINE_KINDS,
                num_workers=teacher.num_workers,
                gpus_per_worker=teacher.gpus_per_worker,
                engine_args=teacher.engine_args,
            )
            for name, teacher in teachers_of(config).by_name.items()
        ),
    ]
