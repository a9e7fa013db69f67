"""Held-out evaluation through the run's own fleets: accuracy by the task's verifier, and the exact reverse KL."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd_ray.controller import Fleets
from opd_ray.metrics import mean_reward
from opd_ray.protocol import (
    Batch,
    GenerateRequest,
    Metrics,
    Payload,
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
    sampling: SamplingOptions  # num_samples is the k of avg@k
    seed: int

    def requests(self, sampling: SamplingOptions, *, version: int) -> list[GenerateRequest]:
        """Return one request a prompt."""
        return [
            GenerateRequest(prompt=p, sampling=sampling, version=version, seed=derive_seed(self.seed, i))
            for i, p in enumerate(self.prompts)
        ]

    def greedy_requests(self, *, version: int) -> list[GenerateRequest]:
        """Return requests for the likeliest response only."""
        return self.requests(replace(self.sampling, num_samples=1, temperature=0.0, top_p=1.0), version=version)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvaluator:
    """`Evaluator` of the student in training."""

    held_out: HeldOut
    fleets: Fleets

    def evaluate(self, version: int) -> Metrics:
        """Return `eval/accuracy` (greedy), `eval/accuracy_avg` (mean of k samples), `eval/reverse_kl` in nats a token.

        The reverse KL is exact over the vocabulary at the prefixes of the k samples. Accuracies are left out where
        prompts have no answers.
        """
        start = time.perf_counter()
        rollout = self.fleets.rollout
        greedy = rollout.generate(self.held_out.greedy_requests(version=version))
        sampled = rollout.generate(self.held_out.requests(self.held_out.sampling, version=version))
        scores = self.fleets.teacher.score(sampled, ScoreRequest(payload=Payload.hidden))
        reverse_kl = self.fleets.learner.held_out_kl(Batch(step=version, groups=sampled, scores=scores))
        return {
            "eval/reverse_kl": reverse_kl,
            **mean_reward("eval/accuracy", rollout.summaries(greedy)),
            **mean_reward("eval/accuracy_avg", rollout.summaries(sampled)),
            "time/eval_s": time.perf_counter() - start,
        }


def teacher_accuracy(held_out: HeldOut, sampler: RolloutFleet) -> Metrics:
    """Return `teacher_accuracy`, greedy, of a fleet that runs the teacher's weights."""
    groups = sampler.generate(held_out.greedy_requests(version=_NOT_A_VERSION))
    return mean_reward("teacher_accuracy", sampler.summaries(groups))
