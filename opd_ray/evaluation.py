"""Held-out evaluation through the run's own fleets: accuracy by the task's verifier, and the exact reverse KL."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from opd_ray.comparison import Comparison, joined
from opd_ray.controller import Fleets
from opd_ray.metrics import mean_reward
from opd_ray.protocol import (
    Batch,
    GenerateRequest,
    GroupHandle,
    GroupSummary,
    Metrics,
    Prompt,
    RolloutFleet,
    SamplingOptions,
    ScoreRequest,
)
from opd_ray.schedule import derive_seed
from opd_ray.services import BadGroup, Quarantine

_NOT_A_VERSION = -1  # any weights may serve


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The held-out prompts and how to sample from them; the same seeds at every evaluation."""

    prompts: Sequence[Prompt]
    sampling: Mapping[str, SamplingOptions]  # by task; num_samples is the k of avg@k
    seed: int

    def requests(self, *, version: int) -> list[GenerateRequest]:
        """Return one request a prompt."""
        return [
            GenerateRequest(
                prompt=p,
                sampling=self.sampling[p.task],
                version=version,
                seed=derive_seed(self.seed, i),
                step=version,
                position=i,
            )
            for i, p in enumerate(self.prompts)
        ]

    def greedy_requests(self, *, version: int) -> list[GenerateRequest]:
        """Return requests for the likeliest response only."""
        return [
            replace(r, sampling=replace(r.sampling, num_samples=1, temperature=0.0, top_p=1.0))
            for r in self.requests(version=version)
        ]

    @property
    def tasks(self) -> set[str]:
        """Return the tasks of the prompts."""
        return {prompt.task for prompt in self.prompts}

    def as_teacher_reads(self) -> "HeldOut":
        """Return the same with the teacher's own prompts where it has some."""
        own = [replace(p, ids_P=p.teacher_ids_P) if len(p.teacher_ids_P) else p for p in self.prompts]
        return replace(self, prompts=own)

    def of_task(self, tasks: Collection[str]) -> "HeldOut":
        """Return the part of some tasks."""
        return replace(self, prompts=[p for p in self.prompts if p.task in tasks])


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvaluator:
    """`Evaluator` of the student in training."""

    held_out: HeldOut
    fleets: Fleets
    # of the teacher: hidden states for the exact KL, or the sampled tokens' log-probs; None: no teacher to ask
    asked: ScoreRequest | None
    quarantine: Quarantine
    keep: Callable[[int, Mapping[str, Comparison]], None] = lambda *_: None  # is given a version's, by task

    def evaluate(self, version: int) -> Metrics:
        """Return `eval/accuracy` (greedy), `eval/accuracy_avg` (mean of k samples), `eval/reverse_kl` in nats a token.

        The reverse KL is taken at the prefixes of the k samples, exactly over the vocabulary; from a teacher without
        hidden states by the sampled tokens, which is unbiased but noisy. Beside it stand the means and quantiles of
        `Comparison.metrics`, such as `eval/teacher_entropy`. All of these are left out where no teacher is there to
        ask, accuracies where prompts have no answers. Groups that the teacher cannot score are left out of the KL,
        which is absent where none is left, and counted in `eval/bad_groups`. With several tasks each has its own as
        well: `eval/reverse_kl_<task>` and so on.
        """
        start = time.perf_counter()
        rollout = self.fleets.rollout
        greedy = rollout.generate(self.held_out.greedy_requests(version=version))
        sampled = rollout.generate(self.held_out.requests(version=version))
        return {
            **self._taught(sampled, version=version),
            **mean_reward("eval/accuracy", rollout.summaries(greedy)),
            **mean_reward("eval/accuracy_avg", rollout.summaries(sampled)),
            "time/eval_s": time.perf_counter() - start,
        }

    def _taught(self, sampled: Sequence[GroupHandle], *, version: int) -> Metrics:
        """Return what a teacher is needed for."""
        if self.asked is None:
            return {}
        scores = self.fleets.teacher.score(sampled, self.asked)
        batch = self._scored(Batch(step=version, groups=sampled, scores=scores))
        return {**self._compared(batch), "eval/bad_groups": float(len(sampled) - len(batch.groups))}

    def _scored(self, batch: Batch) -> Batch:
        """Wait for the scores; return the part of the batch that has them and quarantine the rest."""
        summaries = self.fleets.rollout.summaries(batch.groups)
        faults = [score.fault for score in self.fleets.teacher.summaries(batch.scores)]
        for summary, group, score, fault in zip(summaries, batch.groups, batch.scores, faults, strict=True):
            if fault:
                self.quarantine.add(
                    BadGroup(
                        step=batch.step,
                        held_out=True,
                        teacher=score.teacher,
                        seed=group.request.seed,
                        reason=fault,
                        summary=summary,
                    )
                )
        if all(faults):
            self.quarantine.warn(
                f"version {batch.step}: none of {len(faults)} held-out groups could be scored, so that it has no"
                f" reverse KL; see {self.quarantine.where}"
            )
        return _part(batch, [not fault for fault in faults])

    def _compared(self, batch: Batch) -> Metrics:
        """Return what the learner says of student and teacher at the samples; hand all of it on."""
        of_tasks = {
            task: self.fleets.learner.compare(
                _part(batch, [group.request.prompt.task == task for group in batch.groups])
            )
            for task in sorted({group.request.prompt.task for group in batch.groups})
        }
        of_tasks = {task: compared for task, compared in of_tasks.items() if compared.num_tokens}
        if not of_tasks:
            return {}
        self.keep(batch.step, of_tasks)
        whole = joined(list(of_tasks.values()))
        apart = of_tasks if len(self.held_out.tasks) > 1 else {}
        return {
            "eval/reverse_kl": whole.kl,
            **{f"eval/{name}": value for name, value in whole.metrics().items()},
            **{f"eval/reverse_kl_{task}": compared.kl for task, compared in apart.items()},
            **{f"eval/{n}_{task}": v for task, compared in apart.items() for n, v in compared.metrics().items()},
        }


def _part(batch: Batch, wanted: Sequence[bool]) -> Batch:
    return replace(batch, groups=list(compress(batch.groups, wanted)), scores=list(compress(batch.scores, wanted)))


def greedy_summaries(held_out: HeldOut, sampler: RolloutFleet) -> list[GroupSummary]:
    """Return what a fleet answers to the held-out prompts whatever weights it has, greedily."""
    return sampler.summaries(sampler.generate(held_out.greedy_requests(version=_NOT_A_VERSION)))
