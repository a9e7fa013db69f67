"""Whether what a run holds while it goes on fits into memory.

All needs are lower bounds: activations, compiled code and the engines' own buffers come on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_ray.config.schema import Config, Dtype, RolloutConfig, TeacherConfig
from opd_ray.preflight.facts import ModelFacts
from opd_ray.preflight.finding import Finding, error, ok, size, warning
from opd_ray.preflight.learner import BYTES, TrainedSize, training_bytes
from opd_ray.requests import follows_student
from opd_ray.routing import max_response_tokens, teacher_key, teachers_of

_LOGIT_BYTES = 4  # log-prob mathematics is in float32
_QUANTISED_BYTES = 0.5  # of a parameter: the least there is
_NEARLY_FULL = 0.9
_KV_KEY = "kv_cache_memory_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What each worker of a pool holds at the least."""

    role: str
    num_workers: int
    gpus_per_worker: float
    bytes_per_worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What there is; None: not known here."""

    machine_bytes: int | None
    gpu_bytes: int | None  # of the smallest


def needs(
    config: Config, *, student: ModelFacts, teachers: Mapping[str, ModelFacts], trained: TrainedSize
) -> list[Need]:
    """Return every pool's need: weights, KV cache of the longest sequence, a chunk of logits; teachers by name."""
    chunk_bytes = config.objective.chunk_tokens * student.num_rows * _LOGIT_BYTES
    learner = config.learner
    return [
        *(
            Need(
                role=role,
                num_workers=pool.num_workers,
                gpus_per_worker=pool.gpus_per_worker,
                bytes_per_worker=_engine_bytes(pool, facts, tokens=_longest(config)) + chunk_bytes,
            )
            for role, (pool, facts) in _engines(config, student=student, teachers=teachers).items()
        ),
        Need(
            role="learner",
            num_workers=learner.num_ranks,
            gpus_per_worker=learner.gpus_per_rank,
            bytes_per_worker=training_bytes(learner, trained) + chunk_bytes,
        ),
    ]


def memory(pools: Sequence[Need], *, present: Memory) -> Finding:
    """Compare the needs with the GPU of each worker or of all, and the CPU workers' with the machine's memory."""
    words = ", ".join(f"{need.role} {need.num_workers} x {size(need.bytes_per_worker)}" for need in pools)
    on_cpu = sum(need.num_workers * need.bytes_per_worker for need in pools if not need.gpus_per_worker)
    on_gpu = _fullest_gpu([need for need in pools if need.gpus_per_worker])
    found, worst = f"needed at least: {words}", 0.0
    for kind, needed, there in (
        ("machine's memory", on_cpu, present.machine_bytes),
        ("GPU's memory", on_gpu, present.gpu_bytes),
    ):
        if needed == 0:
            continue
        found += f"; the {kind} is " + (size(there) if there is not None else "not known here")
        worst = max(worst, needed / there if there else 0.0)
    advice = (
        "use fewer workers, a shorter data.max_prompt_tokens or rollout.max_response_tokens, a smaller"
        f" objective.chunk_tokens, *.engine_args.{_KV_KEY} or more GPUs"
    )
    if worst > 1:
        return error("memory", found, advice)
    return warning("memory", found, advice) if worst > _NEARLY_FULL else ok("memory", found)


def _fullest_gpu(pools: Sequence[Need]) -> float:
    """Return the bytes that must fit on one GPU.

    Workers whose parts make up no more than one GPU share it, and any of them may have more than its part: engines give
    theirs back while the learner updates. Elsewhere a worker has its part of a GPU.
    """
    parts = [need.num_workers * need.gpus_per_worker for need in pools]
    if sum(parts) <= 1:
        return sum(need.num_workers * need.bytes_per_worker for need in pools)
    return max(need.bytes_per_worker / need.gpus_per_worker for need in pools)


def kv_cache(config: Config, *, student: ModelFacts, teachers: Mapping[str, ModelFacts]) -> Finding:
    """Compare the KV cache that each engine is told to have with that of one longest sequence."""
    tokens = _longest(config)
    engines = _engines(config, student=student, teachers=teachers)
    one = {role: _kv_bytes(facts, pool.dtype, tokens=tokens) for role, (pool, facts) in engines.items()}
    told = {role: pool.engine_args[_KV_KEY] for role, (pool, _) in engines.items() if pool.engine_args.get(_KV_KEY)}
    small = [role for role, given in told.items() if given < one[role]]
    needed = ", ".join(f"{role} {size(num_bytes)}" for role, num_bytes in one.items())
    found = f"one sequence of {tokens:,} tokens needs: {needed}"
    if not small:
        return ok("KV cache", found)
    given = ", ".join(f"{role}.engine_args.{_KV_KEY}={told[role]}" for role in small)
    return error("KV cache", f"{found}; {given}", f"raise {_KV_KEY}, or leave it out")


def _engines(
    config: Config, *, student: ModelFacts, teachers: Mapping[str, ModelFacts]
) -> dict[str, tuple[RolloutConfig | TeacherConfig, ModelFacts]]:
    """Return each engine's pool and model, by the configuration key of the pool."""
    named = teachers_of(config).by_name
    of_teachers = {teacher_key(name).removesuffix(".path"): (named[name], facts) for name, facts in teachers.items()}
    return {"rollout": (config.rollout, student), **of_teachers}


def _engine_bytes(pool: RolloutConfig | TeacherConfig, facts: ModelFacts, *, tokens: int) -> int:
    kv_bytes = pool.engine_args.get(_KV_KEY) or _kv_bytes(facts, pool.dtype, tokens=tokens)
    weight_bytes = _QUANTISED_BYTES if "quantization" in pool.engine_args else BYTES[pool.dtype]
    if isinstance(pool, TeacherConfig) and follows_student(pool) and not pool.gpus_per_worker:
        weight_bytes += BYTES[Dtype.float32]  # the average; that of a worker with a GPU lies in the machine's memory
    return int(facts.num_parameters * weight_bytes) + int(kv_bytes)


def _kv_bytes(facts: ModelFacts, dtype: Dtype, *, tokens: int) -> int:
    return tokens * facts.kv_values_per_token * BYTES[dtype]


def _longest(config: Config) -> int:
    return config.data.max_prompt_tokens + max_response_tokens(config)
