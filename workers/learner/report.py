"""What the learner's fleet tells a rank of an update, what a rank reports, and how reports become metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from opd_ray.objectives import TokenLosses
from workers.learner.inputs import ScoredSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """What a rank must know of a batch before it reads any tokens."""

    version: int  # of the student, before the update
    num_groups: int  # this rank's
    micro_batches: tuple[tuple[int, ...], ...]  # this rank's sequences, flat over its groups, by micro-batch;
    # all ranks have equally many: the lighter ones end with empty micro-batches
    num_loss_tokens: int  # of the global batch: the loss's denominator


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Sums and maxima over a rank's tokens."""

    loss_sum: float
    divergence_sum: float  # nats
    num_tokens: int
    fresh_gap_max: float  # |learner - sampler| log-prob, nats, over sequences of the current version; -1 without any
    stale_gap_max: float  # the same over sequences with older tokens
    age_sum: float  # versions between sampling and learning, summed over tokens
    grad_norm: float  # global, before clipping
    lr: float
    learn_s: float


@dataclass(slots=True, kw_only=True)
class Totals:
    """Adds up a rank's micro-batches; tensors stay tensors until `report`."""

    version: int
    loss: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)
    gaps: list[torch.Tensor] = field(default_factory=list)
    ages: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    age_sum: int = 0

    def add(self, losses: TokenLosses, sequences: Sequence[ScoredSequence]) -> None:
        """Add one micro-batch."""
        mask = torch.from_numpy(np.concatenate([s.loss_mask for s in sequences]))
        age = self.version - torch.from_numpy(np.concatenate([s.token_versions for s in sequences]))
        # A sequence that ran across an update keeps its old key-value entries: none of its tokens shows the new
        # weights alone, so the gap counts it by its oldest token.
        oldest = [np.full_like(s.token_versions, s.token_versions.min()) for s in sequences]
        sequence_age = self.version - torch.from_numpy(np.concatenate(oldest))
        sampler = torch.from_numpy(np.concatenate([s.sampled_logprobs for s in sequences]))
        self.loss.append(losses.loss_N.detach().sum())
        self.divergence.append(losses.divergence_N.sum())
        self.num_tokens += int(mask.sum())
        self.age_sum += int(age[mask].sum())
        learner = losses.sampled_logprobs_N
        known = slice(len(learner))  # the leading tokens whose log-prob the objective gives
        gap = (learner - sampler[known].to(learner.device)).abs()
        self.gaps.append(gap[mask[known].to(gap.device)])
        self.ages.append(sequence_age[known][mask[known]].to(gap.device))

    def report(self, *, grad_norm: float, lr: float, learn_s: float) -> RankReport:
        """Read the sums off the device, once."""
        gaps, ages = torch.cat(self.gaps), torch.cat(self.ages)
        return RankReport(
            loss_sum=float(torch.stack(self.loss).sum()),
            divergence_sum=float(torch.stack(self.divergence).sum()),
            num_tokens=self.num_tokens,
            fresh_gap_max=_max(gaps[ages <= 0]),
            stale_gap_max=_max(gaps[ages > 0]),
            age_sum=float(self.age_sum),
            grad_norm=grad_norm,
            lr=lr,
            learn_s=learn_s,
        )


def combine(reports: Sequence[RankReport], *, objective: str) -> dict[str, float]:
    """Return the update's metrics over all ranks. A gap that no token could show is left out."""
    num_tokens = sum(r.num_tokens for r in reports)
    metrics = {
        "train/loss": sum(r.loss_sum for r in reports) / num_tokens,
        "train/grad_norm": reports[0].grad_norm,
        "train/lr": reports[0].lr,
        "train/token_age_mean": sum(r.age_sum for r in reports) / num_tokens,
        f"distill/reverse_kl_{objective}": sum(r.divergence_sum for r in reports) / num_tokens,
        "time/learn_s": max(r.learn_s for r in reports),
    }
    fresh, stale = max(r.fresh_gap_max for r in reports), max(r.stale_gap_max for r in reports)
    if fresh >= 0:
        metrics["rollout/logprob_gap_max"] = fresh
    if stale >= 0:
        metrics["rollout/logprob_gap_stale_max"] = stale
    return metrics


def _max(values: torch.Tensor) -> float:
    return float(values.max()) if len(values) else -1.0
