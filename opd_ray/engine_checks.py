"""Has the run's own engines look at a handful of tokens, one pool at a time, and compares what they say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray

import workers
from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.data.teacher_context import with_room
from opd_ray.evaluation import HeldOut
from opd_ray.preflight.engines import gap, opd_signal, replicas, same_temperature, self_kl
from opd_ray.preflight.finding import Finding, ok
from opd_ray.protocol import CannotGoOn, Float32, GroupHandle, Payload, Prompt, ScoreRequest, TrajectoryGroup
from opd_ray.requests import held_out_samples
from opd_ray.routing import recorded_scores, teacher_key, teachers_of

_NUM_PROMPTS = 4  # of each task
_NUM_SAMPLES = 2
_NOT_A_VERSION = -1  # any weights may serve


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTest:
    """Opens one pool after the other, so that it needs no more room than the run itself."""

    config: Config
    vocab_size: int  # rows that all heads have
    temperature: float  # at which teachers score; in a sound run rollout.temperature
    log_dir: Path

    def sample(self, prompts: Sequence[Prompt]) -> list[TrajectoryGroup]:
        """Return the student's own samples, with its log-probs at rollout.temperature."""
        config = replace(self.config, objective=replace(self.config.objective, correct_top_p=False))
        sampling = {
            p.task: replace(held_out_samples(config, p.task), num_samples=_NUM_SAMPLES, top_p=1.0) for p in prompts
        }
        held_out = HeldOut(prompts=prompts, sampling=sampling, seed=config.seed)
        student = student_as_teacher(config)
        with workers.teacher_sampler(config, student, log_dir=self.log_dir, role="student-sampler") as sampler:
            handles = sampler.generate(held_out.requests(version=_NOT_A_VERSION))
            groups: list[TrajectoryGroup] = ray.get([handle.group for handle in handles])
        return groups

    def score(self, teacher: TeacherConfig, *, groups: Sequence[TrajectoryGroup], role: str) -> list[Float32]:
        """Return the log-probs of the sampled tokens by each of the teacher's workers."""
        handles = [GroupHandle(task=group.task, summary=None, group=group) for group in groups]
        prompts = [group.teacher_prompt_ids for group in groups]
        with workers.teacher_scorer(
            with_room(self.config, prompts),
            teacher,
            log_dir=self.log_dir,
            role=role,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
        ) as fleet:
            answers = fleet.score_by_all(handles, ScoreRequest(payload=Payload.sampled))
            summaries = fleet.summaries([answer for by_one in answers for answer in by_one])
            faults = [summary.fault for summary in summaries if summary.fault]
            if faults:
                raise CannotGoOn(f"{role}: {len(faults)} of {len(summaries)} groups have no score: {faults[0]}")
            return [_flat([s.logprobs_N for s in ray.get([a.score for a in by_one])]) for by_one in answers]


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


def engine_findings(test: EngineTest, *, prompts: Sequence[Prompt], reference: TeacherConfig) -> list[Finding]:
    """Sample from the student, have reference and teachers score the samples, and judge what they say.

    In a sound run the reference is `student_as_teacher`. Raises ValueError when the cluster has no place, RayError
    when an engine fails, CannotGoOn when a teacher cannot score.
    """
    config, teachers = test.config, teachers_of(test.config)
    groups = test.sample(handful(prompts))
    # The sampler read the student's prompts, so the reference must; a teacher may have prompts of its own.
    as_sampled = [replace(group, teacher_prompt_ids=group.teacher_prompt_ids[:0]) for group in groups]
    (reference_N,) = test.score(reference, groups=as_sampled, role="student-as-teacher")
    student = gap(_flat([group.sampled_logprobs for group in groups]), reference_N)
    signals, disagreements = dict[str, float](), list[Finding]()
    alive = {} if recorded_scores(config) is not None else teachers.by_name
    for name, teacher in alive.items():
        mine = [group for group in groups if teachers.name_of(group.task) == name]
        if not mine:
            continue
        key = teacher_key(name).removesuffix(".path")
        by_workers = test.score(teacher, groups=mine, role=key.replace("s.", "-"))
        signals[key] = gap(_flat([group.sampled_logprobs for group in mine]), by_workers[0]).kl
        disagreements.append(replicas(key, by_workers, dtype=teacher.dtype, signal=signals[key]))
    weakest, dtype = min(signals.values(), default=0.0), config.rollout.dtype
    recorded = ok("OPD signal", "not measured: the scores were recorded by an earlier run, there is no teacher to ask")
    return [
        opd_signal(signals) if alive else recorded,
        self_kl(student, dtype=dtype, signal=weakest),
        same_temperature(student, dtype=dtype, temperature=config.rollout.temperature, signal=weakest),
        *disagreements,
    ]


def handful(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the first few prompts of each task."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    return [prompt for of_task in by_task.values() for prompt in of_task[:_NUM_PROMPTS]]


def _flat(parts: Sequence[Float32]) -> Float32:
    return np.concatenate(parts)
