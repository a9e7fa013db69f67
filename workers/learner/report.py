"""What the learner's fleet tells a rank of an update, what a rank reports, and how reports become metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from opd_ray.config.objective import DivergenceKind, ObjectiveConfig, ObjectiveKind
from opd_ray.objectives import Losses
from opd_ray.protocol import ScoreSummary
from workers.learner.inputs import ScoredSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """What a rank must know of a batch before it reads any tokens."""

    version: int  # of the student, before the update
    teachers: tuple[str, ...]  # who scored each of this rank's groups
    micro_batches: tuple[tuple[int, ...], ...]  # this rank's sequences, flat over its groups, by micro-batch;
    # each of one teacher; all ranks have equally many: the lighter ones end with empty micro-batches

    @property
    def num_groups(self) -> int:
        """Return how many groups this rank has."""
        return len(self.teachers)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Sums and maxima over a rank's tokens."""

    loss_sum: float  # of token losses times their weights
    denominator: float  # this rank's part of what the global sum is divided by
    divergence_sum: float  # nats
    num_tokens: int  # that count
    num_sampled: int  # all response tokens, masked ones too
    stat_sums: dict[str, float]  # of `Losses.stats` over tokens that count
    diagnostic_sums: dict[str, float]  # of `Losses.diagnostics` over `num_diagnosed` tokens
    num_diagnosed: int
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
    stats: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    diagnostics: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    gaps: list[torch.Tensor] = field(default_factory=list)
    ages: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    num_sampled: int = 0
    num_diagnosed: int = 0
    age_sum: int = 0

    def add(self, losses: Losses, sequences: Sequence[ScoredSequence]) -> None:
        """Add one micro-batch."""
        mask = torch.from_numpy(np.concatenate([s.kept for s in sequences]))
        self.loss.append(losses.loss.detach())
        self.divergence.append(losses.divergence_N.sum())
        self.num_tokens += int(mask.sum())
        self.num_sampled += len(mask)
        for name, values in losses.stats.items():
            self.stats.setdefault(name, []).append(values.sum())
        diagnostics = dict(losses.diagnostics)
        learner = diagnostics.pop("sampled_logprob", losses.sampled_logprobs_N)
        if len(losses.sampled_logprobs_N):
            learner = losses.sampled_logprobs_N  # of all tokens
        for name, values in diagnostics.items():
            self.diagnostics.setdefault(name, []).append(values.sum())
            self.num_diagnosed += int(mask[: len(values)].sum()) if name == "student_entropy" else 0
        self._add_gaps(learner, mask, sequences)

    def _add_gaps(self, learner: torch.Tensor, mask: torch.Tensor, sequences: Sequence[ScoredSequence]) -> None:
        age = self.version - torch.from_numpy(np.concatenate([s.token_versions for s in sequences]))
        self.age_sum += int(age[mask].sum())
        # A sequence that ran across an update keeps its old key-value entries: none of its tokens shows the new
        # weights alone, so the gap counts it by its oldest token.
        oldest = [np.full_like(s.token_versions, s.token_versions.min()) for s in sequences]
        sequence_age = self.version - torch.from_numpy(np.concatenate(oldest))
        sampler = torch.from_numpy(np.concatenate([s.sampled_logprobs for s in sequences]))
        known = slice(len(learner))  # the leading tokens whose log-prob the objective gives
        gap = (learner - sampler[known].to(learner.device)).abs()
        self.gaps.append(gap[mask[known].to(gap.device)])
        self.ages.append(sequence_age[known][mask[known]].to(gap.device))

    def report(self, *, denominator: float, grad_norm: float, lr: float, learn_s: float) -> RankReport:
        """Read the sums off the device, once."""
        gaps, ages = torch.cat(self.gaps), torch.cat(self.ages)
        return RankReport(
            loss_sum=float(torch.stack(self.loss).sum()),
            denominator=denominator,
            divergence_sum=float(torch.stack(self.divergence).sum()),
            num_tokens=self.num_tokens,
            num_sampled=self.num_sampled,
            stat_sums={name: float(torch.stack(values).sum()) for name, values in self.stats.items()},
            diagnostic_sums={name: float(torch.stack(values).sum()) for name, values in self.diagnostics.items()},
            num_diagnosed=self.num_diagnosed,
            fresh_gap_max=_max(gaps[ages <= 0]),
            stale_gap_max=_max(gaps[ages > 0]),
            age_sum=float(self.age_sum),
            grad_norm=grad_norm,
            lr=lr,
            learn_s=learn_s,
        )


def combine(reports: Sequence[RankReport], *, estimate: str) -> dict[str, float]:
    """Return the update's metrics over all ranks. What no token could show is left out."""
    num_tokens = max(sum(r.num_tokens for r in reports), 1)
    metrics = {
        "train/loss": sum(r.loss_sum for r in reports) / max(sum(r.denominator for r in reports), 1.0),
        "train/grad_norm": reports[0].grad_norm,
        "train/lr": reports[0].lr,
        "train/token_age_mean": sum(r.age_sum for r in reports) / num_tokens,
        "train/kept_token_fraction": sum(r.num_tokens for r in reports) / sum(r.num_sampled for r in reports),
        f"distill/{estimate}": sum(r.divergence_sum for r in reports) / num_tokens,
        "time/learn_s": max(r.learn_s for r in reports),
    }
    means = {name: sum(r.stat_sums[name] for r in reports) / num_tokens for name in reports[0].stat_sums}
    if "ratio" in means:
        metrics |= {
            "train/ratio_mean": means["ratio"],
            "train/ess_fraction": means["ratio"] ** 2 / max(means["ratio_squared"], 1e-30),
            "train/ratio_clipped_fraction": means["ratio_clipped"],
            "train/reward_clipped_fraction": means["reward_clipped"],
        }
    if "support_teacher_mass" in means:
        metrics["distill/support_teacher_mass"] = means["support_teacher_mass"]
    num_diagnosed = sum(r.num_diagnosed for r in reports)
    if num_diagnosed:
        names = reports[0].diagnostic_sums
        metrics |= {f"distill/{n}": sum(r.diagnostic_sums[n] for r in reports) / num_diagnosed for n in names}
    fresh, stale = max(r.fresh_gap_max for r in reports), max(r.stale_gap_max for r in reports)
    if fresh >= 0:
        metrics["rollout/logprob_gap_max"] = fresh
    if stale >= 0:
        metrics["rollout/logprob_gap_stale_max"] = stale
    return metrics


def teacher_metrics(scored: Sequence[ScoreSummary]) -> dict[str, float]:
    """Return what the scores of an update cost, and what the teacher holds likely that the student cannot say."""
    num_tokens = sum(s.num_tokens for s in scored)
    known = [s for s in scored if not math.isnan(s.dropped_mass_sum)]
    return {
        "teacher/bytes_per_token": sum(s.num_bytes for s in scored) / num_tokens,
        "teacher/score_s_mean": sum(s.score_s for s in scored) / len(scored),
        **({"teacher/dropped_mass": _mean_dropped_mass(known)} if known else {}),
    }


def _mean_dropped_mass(scored: Sequence[ScoreSummary]) -> float:
    return sum(s.dropped_mass_sum for s in scored) / sum(s.num_tokens for s in scored)


def estimate_name(objective: ObjectiveConfig) -> str:
    """Return what the objective's divergence_N estimates and how, such as `reverse_kl_support`."""
    sampled = objective.kind is ObjectiveKind.sampled
    divergence = DivergenceKind.reverse_kl if sampled else objective.divergence
    return f"{divergence.value}_{objective.kind.value}"


def _max(values: torch.Tensor) -> float:
    return float(values.max()) if len(values) else -1.0
