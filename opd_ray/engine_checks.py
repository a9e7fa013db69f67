"""Has the run's own engines look at a handful of tokens, one pool at a time, and compares what they say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

import workers
from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.data.hub import local_folder
from opd_ray.data.teacher_context import with_room
from opd_ray.evaluation import HeldOut
from opd_ray.preflight.engines import (
    Gap,
    engine_gap_metrics,
    gap,
    opd_signal,
    reference_gap,
    replicas,
    same_temperature,
    self_kl,
)
from opd_ray.preflight.facts import num_parameters
from opd_ray.preflight.finding import GIB, Finding, ok, size, warning
from opd_ray.protocol import (
    Batch,
    CannotGoOn,
    Float32,
    GroupHandle,
    Int32,
    Metrics,
    Payload,
    Prompt,
    ScoreHandle,
    ScoreRequest,
    TrajectoryGroup,
)
from opd_ray.requests import gives_hidden_states, held_out_samples
from opd_ray.routing import recorded_scores, teacher_key, teachers_of

_NUM_PROMPTS = 4  # of each task, at least
_NUM_SAMPLES = 2
_NOT_A_VERSION = -1  # any weights may serve
_TWIN = "student-as-teacher"
_NUM_REFERENCE_TOKENS = 64  # of a teacher that says nothing of it
_CHEAP_BYTES, _FLOAT32_BYTES = 4 * GIB, 4  # up to which a checkpoint is read without having been asked


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTest:
    """Opens one pool after the other, so that it needs no more room than the run itself."""

    config: Config
    vocab_size: int  # rows that all heads have
    temperature: float  # at which teachers score; in a sound run rollout.temperature
    log_dir: Path

    def sample(self, prompts: Sequence[Prompt]) -> list[GroupHandle]:
        """Return the student's own samples, with its log-probs at rollout.temperature, as references."""
        config = replace(self.config, objective=replace(self.config.objective, correct_top_p=False))
        sampling = {
            p.task: replace(held_out_samples(config, p.task), num_samples=_NUM_SAMPLES, top_p=1.0) for p in prompts
        }
        held_out = HeldOut(prompts=prompts, sampling=sampling, seed=config.seed)
        student = student_as_teacher(config)
        with workers.teacher_sampler(config, student, log_dir=self.log_dir, role="student-sampler") as sampler:
            handles = sampler.generate(held_out.requests(version=_NOT_A_VERSION))
            return [
                replace(handle, summary=ray.put(ray.get(handle.summary)), group=ray.put(ray.get(handle.group)))
                for handle in handles
            ]

    def score(self, teacher: TeacherConfig, *, handles: Sequence[GroupHandle], role: str) -> list[Float32]:
        """Return the log-probs of the sampled tokens by each of the teacher's workers."""
        by_worker = self._ask(teacher, handles=handles, role=role, request=ScoreRequest(payload=Payload.sampled))
        return [_flat([score.logprobs_N for score in scores]) for scores in by_worker]

    def kl(self, teacher: TeacherConfig, *, handles: Sequence[GroupHandle], role: str) -> tuple[float, Float32]:
        """Return KL(student || teacher), exact over the vocabulary at the samples' prefixes, in nats a token, and the
        teacher's log-probs of the sampled tokens.

        The student is the learner's own forward pass, the teacher the hidden states of its first worker and its head.
        """
        request = ScoreRequest(payload=Payload.hidden, sampled_logprobs=True)
        scores = self._ask(teacher, handles=handles, role=role, request=request)[0]
        answers = [ScoreHandle(teacher=role, summary=None, score=ray.put(score)) for score in scores]
        with workers.learner_alone(
            self.config, teacher_paths={role: teacher.path}, vocab_size=self.vocab_size, log_dir=self.log_dir
        ) as learner:
            compared = learner.compare(Batch(step=0, groups=handles, scores=answers))
        return compared.kl, _flat([score.sampled_logprobs_N for score in scores])

    def reference_gap(
        self, teacher: TeacherConfig, *, handles: Sequence[GroupHandle], by_engine_N: Float32, num_tokens: int
    ) -> Gap:
        """Compare a teacher's log-probs of the sampled tokens with those of its checkpoint, on num_tokens of them."""
        rows_N, samples = leading_tokens(groups_of(handles), num_tokens=num_tokens)
        reference_N = workers.reference_logprobs(
            self.config, teacher, samples, vocab_size=self.vocab_size, log_dir=self.log_dir
        )
        return gap(reference_N, by_engine_N[rows_N])

    def _ask(
        self, teacher: TeacherConfig, *, handles: Sequence[GroupHandle], role: str, request: ScoreRequest
    ) -> list[list[Any]]:
        prompts = [group.teacher_prompt_ids for group in groups_of(handles)]
        with workers.teacher_scorer(
            with_room(self.config, prompts),
            teacher,
            log_dir=self.log_dir,
            role=role,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
        ) as fleet:
            answers = fleet.score_by_all(handles, request)
            summaries = fleet.summaries([answer for by_one in answers for answer in by_one])
            faults = [summary.fault for summary in summaries if summary.fault]
            if faults:
                raise CannotGoOn(f"{role}: {len(faults)} of {len(summaries)} groups have no score: {faults[0]}")
            return [ray.get([answer.score for answer in by_one]) for by_one in answers]


def student_as_teacher(config: Config) -> TeacherConfig:
    """Return the teacher that is the student: its weights under the rollout engine's dtype, devices and arguments."""
    rollout = config.rollout
    return TeacherConfig(
        path=config.student.path,
        dtype=rollout.dtype,
        cpus_per_worker=rollout.cpus_per_worker,
        gpus_per_worker=rollout.gpus_per_worker,
        engine_args=rollout.engine_args,
    )


def engine_findings(test: EngineTest, *, prompts: Sequence[Prompt], twin: TeacherConfig) -> list[Finding]:
    """Sample from the student, have its twin and the teachers score the samples, and judge what they say.

    In a sound run the twin is `student_as_teacher`. Raises ValueError when the cluster has no place, RayError when an
    engine fails, CannotGoOn when a teacher cannot score.
    """
    config, teachers = test.config, teachers_of(test.config)
    handles = test.sample(handful(prompts, num_ranks=config.learner.num_ranks))
    kl, twin_N = test.kl(twin, handles=_as_sampled(handles), role=_TWIN)
    student = gap(_sampled(handles), twin_N)
    signals, of_teachers = dict[str, float](), list[Finding]()
    alive = {} if recorded_scores(config) is not None else teachers.by_name
    for name, teacher in alive.items():
        mine = [handle for handle in handles if teachers.name_of(handle.request.prompt.task) == name]
        if not mine:
            continue
        key = teacher_key(name).removesuffix(".path")
        by_workers = test.score(teacher, handles=mine, role=key.replace("s.", "-"))
        signals[key] = gap(_sampled(mine), by_workers[0]).kl
        of_teachers += [
            replicas(key, by_workers, dtype=teacher.dtype, signal=signals[key]),
            _against_reference(test, key, teacher, handles=mine, by_engine_N=by_workers[0]),
        ]
    weakest, dtypes = min(signals.values(), default=0.0), (config.rollout.dtype, config.learner.dtype)
    recorded = ok("OPD signal", "not measured: the scores were recorded by an earlier run, there is no teacher to ask")
    return [
        opd_signal(signals) if alive else recorded,
        self_kl(kl, dtypes=dtypes, signal=weakest),
        same_temperature(student, dtype=config.rollout.dtype, temperature=config.rollout.temperature, signal=weakest),
        *of_teachers,
    ]


def teacher_gaps(test: EngineTest, *, prompts: Sequence[Prompt]) -> Metrics:
    """Return `teacher/engine_gap_*` of the teachers whose reference_tokens say so; nothing where none do."""
    teachers = teachers_of(test.config)
    asked = {name: t for name, t in teachers.by_name.items() if t.reference_tokens and gives_hidden_states(t)}
    mine = [p for p in prompts if teachers.name_of(p.task) in asked]
    if not mine:
        return {}
    handles = test.sample(handful(mine, num_ranks=1))
    gaps = {}
    for name, teacher in asked.items():
        of_teacher = [handle for handle in handles if teachers.name_of(handle.request.prompt.task) == name]
        logprobs_N = test.score(teacher, handles=of_teacher, role=f"{name}-engine")[0]
        assert teacher.reference_tokens is not None
        measured = test.reference_gap(
            teacher, handles=of_teacher, by_engine_N=logprobs_N, num_tokens=teacher.reference_tokens
        )
        gaps[name] = (measured, gap(_sampled(of_teacher), logprobs_N).mean)
    return engine_gap_metrics(gaps)


def handful(prompts: Sequence[Prompt], *, num_ranks: int) -> list[Prompt]:
    """Return the first few prompts of each task, at least one for each rank of the learner."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    num_each = max(_NUM_PROMPTS, num_ranks)
    return [prompt for of_task in by_task.values() for prompt in of_task[:num_each]]


def groups_of(handles: Sequence[GroupHandle]) -> list[TrajectoryGroup]:
    """Return the groups themselves."""
    groups: list[TrajectoryGroup] = ray.get([handle.group for handle in handles])
    return groups


def _as_sampled(handles: Sequence[GroupHandle]) -> list[GroupHandle]:
    """Return the groups without prompts of the teacher's own: the sampler read the student's, so must its twin."""
    own = [replace(group, teacher_prompt_ids=group.teacher_prompt_ids[:0]) for group in groups_of(handles)]
    return [replace(handle, group=ray.put(group)) for handle, group in zip(handles, own, strict=True)]


def leading_tokens(groups: Sequence[TrajectoryGroup], *, num_tokens: int) -> tuple[Int32, list[tuple[Int32, Int32]]]:
    """Choose num_tokens response tokens, as far as there are: the first of each group's first response.

    Returns their positions [N] in all response tokens laid end to end, and for each group with any the prompt that the
    teacher reads and the beginning of the response.
    """
    rows, samples, first, left = list[Int32](), list[tuple[Int32, Int32]](), 0, num_tokens
    for index, group in enumerate(groups):
        share = min(-(-left // (len(groups) - index)), int(group.offsets[1]))
        if share:
            rows.append(np.arange(first, first + share, dtype=np.int32))
            prompt_ids = group.teacher_prompt_ids if len(group.teacher_prompt_ids) else group.prompt_ids
            samples.append((prompt_ids, group.response_ids[:share]))
        first, left = first + len(group.response_ids), left - share
    return np.concatenate(rows), samples


def _against_reference(
    test: EngineTest, key: str, teacher: TeacherConfig, *, handles: Sequence[GroupHandle], by_engine_N: Float32
) -> Finding:
    """Compare a teacher's engine with its checkpoint, or say why not."""
    name = f"engine of {key}"
    if not gives_hidden_states(teacher):
        return ok(name, "not compared: no engine of this run on the student's own tokens")
    num_tokens = teacher.reference_tokens
    if num_tokens is None:
        num_bytes = num_parameters(local_folder(teacher.path)) * _FLOAT32_BYTES
        if num_bytes > _CHEAP_BYTES:
            return warning(
                name,
                f"not compared with its checkpoint: in float32 its weights take {size(num_bytes)}",
                f"say {key}.reference_tokens={_NUM_REFERENCE_TOKENS} to compare all the same, on CPUs of one node",
            )
        num_tokens = _NUM_REFERENCE_TOKENS
    if num_tokens == 0:
        return ok(name, f"not compared: {key}.reference_tokens=0")
    measured = test.reference_gap(teacher, handles=handles, by_engine_N=by_engine_N, num_tokens=num_tokens)
    signal = gap(_sampled(handles), by_engine_N).mean
    return reference_gap(key, measured, dtype=teacher.dtype, signal=signal)


def _sampled(handles: Sequence[GroupHandle]) -> Float32:
    return _flat([group.sampled_logprobs for group in groups_of(handles)])


def _flat(parts: Sequence[Float32]) -> Float32:
    return np.concatenate(parts)
