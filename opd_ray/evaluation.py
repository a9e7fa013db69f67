"""Held-out evaluation through the run's own fleets: accuracy by the task's verifier, and the exact reverse KL."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from opd_ray.controller import Fleets
from opd_ray.metrics import mean_reward
from opd_ray.protocol import (
    Batch,
    GenerateRequest,
    GroupSummary,
    Metrics,
    Prompt,
    RolloutFleet,
    SamplingOptions,
    ScoreRequest,
)
from opd_ray.schedule import derive_seed

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
            GenerateRequest(prompt=p, sampling=self.sampling[p.task], version=version, seed=derive_seed(self.seed, i))
            for i, p in enumerate(self.prompts)
        ]

    def greedy_requests(self, *, version: int) -> list[GenerateRequest]:
        """Return requests for the likeliest response only."""
        return [
            replace(r, sampling=replace(r.sampling, num_samples=1, temperature=0.0, top_p=1.0))
            for r in self.requests(version=version)
        ]

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

    def evaluate(self, version: int) -> Metrics:
        """Return `eval/accuracy` (greedy), `eval/accuracy_avg` (mean of k samples), `eval/reverse_kl` in nats a token.

        The reverse KL is taken at the prefixes of the k samples, exactly over the vocabulary; from a teacher without
        hidden states by the sampled tokens, which is unbiased but noisy. It is left out where no teacher is there to
        ask, accuracies where prompts have no answers. With several tasks each has its own as well:
        `eval/reverse_kl_<task>` and so on.
        """
        start = time.perf_counter()
        rollout = self.fleets.rollout
        greedy = rollout.generate(self.held_out.greedy_requests(version=version))
        sampled = rollout.generate(self.held_out.requests(version=version))
        scores = [] if self.asked is None else self.fleets.teacher.score(sampled, self.asked)
        return {
            **(self._reverse_kl(Batch(step=version, groups=sampled, scores=scores)) if scores else {}),
            **mean_reward("eval/accuracy", rollout.summaries(greedy)),
            **mean_reward("eval/accuracy_avg", rollout.summaries(sampled)),
            "time/eval_s": time.perf_counter() - start,
        }

    def _reverse_kl(self, batch: Batch) -> Metrics:
        learner = self.fleets.learner
        metrics = {"eval/reverse_kl": learner.held_out_kl(batch)}
        tasks = sorted({group.task for group in batch.groups})
        for task in tasks if len(tasks) > 1 else []:
            pairs = [(g, s) for g, s in zip(batch.groups, batch.scores, strict=True) if g.task == task]
            of_task = replace(batch, groups=[g for g, _ in pairs], scores=[s for _, s in pairs])
            metrics[f"eval/reverse_kl_{task}"] = learner.held_out_kl(of_task)
        return metrics


def greedy_summaries(held_out: HeldOut, sampler: RolloutFleet) -> list[GroupSummary]:
    """Return what a fleet answers to the held-out prompts whatever weights it has, greedily."""
    return sampler.summaries(sampler.generate(held_out.greedy_requests(version=_NOT_A_VERSION)))
