"""What the learner's fleet tells a rank of an update, what a rank reports, and how reports become metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from opd_ray.arrays import Float32
from opd_ray.config.objective import DivergenceKind, ObjectiveConfig, ObjectiveKind
from opd_ray.objectives import Losses
from opd_ray.protocol import RECORDED_VERSION, ScoreSummary
from workers.learner.inputs import ScoredSequence
from workers.learner.noise import gradient_noise
from workers.learner.task_gradients import norms

_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """What a rank must know of a batch before it reads any tokens."""

    version: int  # of the student, before the batch
    part: int = 0  # which of the batch's updates this is
    teachers: tuple[str, ...]  # who scored each of this rank's groups
    micro_batches: tuple[tuple[int, ...], ...]  # this rank's sequences, flat over its groups, by micro-batch;
    # each of one teacher; all ranks have equally many: the lighter ones end with empty micro-batches
    tasks_apart: bool = False  # each is of one task as well, and each task's gradient is measured

    @property
    def num_groups(self) -> int:
        """Return how many groups this rank has."""
        return len(self.teachers)


@dataclass(frozen=True, slots=True, kw_only=True)
class GapSums:
    """How far the sampler's log-probs are from the learner's over some tokens, in nats, beside the OPD signal there."""

    num_tokens: int
    gap_sum: float  # of |learner - sampler| log-prob
    gap_max: float
    signal_sum: float  # of `Losses.stats["signal"]`


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
    fresh_gaps: GapSums  # over sequences of the current version, in the batch's first update
    stale_gaps: GapSums  # over sequences with older tokens, and all of the updates after the first
    recorded_gaps: GapSums  # over sequences that an earlier run recorded: how far the student is from then
    age_sum: float  # versions between sampling and learning, summed over tokens that this run sampled
    age_max: int  # of the same tokens; 0 without any
    num_recorded: int  # tokens that count and that an earlier run recorded
    grad_norm: float  # global, before clipping
    lr: float
    learn_s: float
    gradient_squares: float = 0.0  # of micro-batches' own gradients, summed, before the mean over ranks; 0: not asked
    num_micro_batches: int = 0  # with a loss
    left_out: bool = False  # the step: its gradients were not finite, or
    spiked: bool = False  # their norm was far above what it had been
    task_gradients: Mapping[str, Float32] = field(default_factory=dict)  # projections, see `TaskGradients`


@dataclass(slots=True, kw_only=True)
class Totals:
    """Adds up a rank's micro-batches; tensors stay tensors until `report`."""

    version: int
    part: int = 0
    loss: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)
    stats: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    diagnostics: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    gaps: list[torch.Tensor] = field(default_factory=list)
    signals: list[torch.Tensor] = field(default_factory=list)  # of the tokens of `gaps`
    ages: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    num_sampled: int = 0
    num_diagnosed: int = 0
    age_sum: int = 0
    age_max: int = 0
    num_recorded: int = 0

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
        self._add_gaps(learner, losses.stats["signal"], mask, sequences)

    def _add_gaps(
        self, learner: torch.Tensor, signal: torch.Tensor, mask: torch.Tensor, sequences: Sequence[ScoredSequence]
    ) -> None:
        versions = torch.from_numpy(np.concatenate([s.token_versions for s in sequences]))
        recorded = mask & (versions == RECORDED_VERSION)
        self.num_recorded += int(recorded.sum())
        own_ages = (self.version - versions)[mask & ~recorded]
        self.age_sum += int(own_ages.sum())
        self.age_max = max(self.age_max, int(own_ages.max()) if len(own_ages) else 0)
        # A sequence that ran across an update keeps its old key-value entries: none of its tokens shows the new
        # weights alone, so the gap counts it by its oldest token.
        oldest = [np.full_like(s.token_versions, s.token_versions.min()) for s in sequences]
        sequence_age = self.version - torch.from_numpy(np.concatenate(oldest))
        sampler = torch.from_numpy(np.concatenate([s.sampled_logprobs for s in sequences]))
        known = slice(len(learner))  # the leading tokens whose log-prob the objective gives
        gap = (learner - sampler[known].to(learner.device)).abs()
        self.gaps.append(gap[mask[known].to(gap.device)])
        self.signals.append(signal[known][mask[known].to(signal.device)])
        self.ages.append(sequence_age[known][mask[known]].to(gap.device))

    def report(
        self,
        *,
        denominator: float,
        grad_norm: float,
        lr: float,
        learn_s: float,
        gradient_squares: float = 0.0,
        num_micro_batches: int = 0,
    ) -> RankReport:
        """Read the sums off the device, once."""
        gaps, ages, signals = torch.cat(self.gaps), torch.cat(self.ages), torch.cat(self.signals)
        recorded = ages == self.version - RECORDED_VERSION
        # From the second update of a batch on the student is the sampler's policy of no version.
        fresh = (ages <= 0) & (self.part == 0)
        stale = ~fresh & ~recorded
        return RankReport(
            loss_sum=float(torch.stack(self.loss).sum()),
            denominator=denominator,
            divergence_sum=float(torch.stack(self.divergence).sum()),
            num_tokens=self.num_tokens,
            num_sampled=self.num_sampled,
            stat_sums={name: float(torch.stack(values).sum()) for name, values in self.stats.items()},
            diagnostic_sums={name: float(torch.stack(values).sum()) for name, values in self.diagnostics.items()},
            num_diagnosed=self.num_diagnosed,
            fresh_gaps=_gap_sums(gaps[fresh], signals[fresh]),
            stale_gaps=_gap_sums(gaps[stale], signals[stale]),
            recorded_gaps=_gap_sums(gaps[recorded], signals[recorded]),
            age_sum=float(self.age_sum),
            age_max=self.age_max,
            num_recorded=self.num_recorded,
            grad_norm=grad_norm,
            lr=lr,
            learn_s=learn_s,
            gradient_squares=gradient_squares,
            num_micro_batches=num_micro_batches,
        )


def combine(reports: Sequence[RankReport], *, estimate: str) -> dict[str, float]:
    """Return the update's metrics over all ranks. What no token could show is left out."""
    num_tokens = max(sum(r.num_tokens for r in reports), 1)
    metrics = {
        "train/loss": sum(r.loss_sum for r in reports) / max(sum(r.denominator for r in reports), 1.0),
        "train/grad_norm": reports[0].grad_norm,
        "train/lr": reports[0].lr,
        "train/kept_token_fraction": sum(r.num_tokens for r in reports) / sum(r.num_sampled for r in reports),
        f"distill/{estimate}": sum(r.divergence_sum for r in reports) / num_tokens,
        "time/learn_s": max(r.learn_s for r in reports),
    }
    means = {name: sum(r.stat_sums[name] for r in reports) / num_tokens for name in reports[0].stat_sums}
    metrics["distill/signal"] = means["signal"]
    if "negative_reward" in means:
        metrics["train/negative_reward_fraction"] = means["negative_reward"]
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
    metrics |= _gap_metrics("rollout/logprob_gap", [r.fresh_gaps for r in reports])
    metrics |= _gap_metrics("rollout/logprob_gap_stale", [r.stale_gaps for r in reports])
    metrics |= _gap_metrics("rollout/logprob_gap_recorded", [r.recorded_gaps for r in reports])
    return metrics | _age(reports, num_tokens=num_tokens)


def combine_updates(updates: Sequence[Sequence[RankReport]], *, estimate: str) -> dict[str, float]:
    """Return the metrics of a batch from the reports of all ranks on each of its updates, in order.

    Means are over the tokens of all updates; the learning rate is the last one's.
    """
    whole = [reports[0].grad_norm for reports in updates]
    of_tasks = [norms([report.task_gradients for report in reports]) for reports in updates]
    noise = [value for value in map(_noise, updates) if value is not None]
    return {
        **combine([report for reports in updates for report in reports], estimate=estimate),
        "train/num_updates": len(updates),
        "train/grad_norm": sum(whole) / len(whole),
        **({"train/grad_norm_max": max(whole)} if len(whole) > 1 else {}),
        **{f"train/grad_norm_{task}": sum(u.get(task, 0.0) for u in of_tasks) / len(updates) for task in of_tasks[0]},
        **({"train/gradient_noise": sum(noise) / len(noise)} if noise else {}),
        "train/lr": updates[-1][0].lr,
        "fault/skipped_steps": sum(reports[0].left_out for reports in updates),
        "fault/spikes": sum(reports[0].spiked for reports in updates),
        "time/learn_s": sum(max(r.learn_s for r in reports) for reports in updates),
    }


def _noise(reports: Sequence[RankReport]) -> float | None:
    """Return the gradient noise of one update over all ranks; None where it was not asked for or cannot be known."""
    squares = sum(r.gradient_squares for r in reports) / len(reports) ** 2  # the gradient is the mean over ranks
    if squares == 0:
        return None
    num_micro_batches = sum(r.num_micro_batches for r in reports)
    return gradient_noise(squares=squares, num_micro_batches=num_micro_batches, norm=reports[0].grad_norm)


def _age(reports: Sequence[RankReport], *, num_tokens: int) -> dict[str, float]:
    num_own = num_tokens - sum(r.num_recorded for r in reports)
    if num_own == 0:
        return {}
    return {
        "train/token_age_mean": sum(r.age_sum for r in reports) / num_own,
        "train/token_age_max": max(r.age_max for r in reports),
    }


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


def _gap_sums(gaps: torch.Tensor, signals: torch.Tensor) -> GapSums:
    return GapSums(
        num_tokens=len(gaps),
        gap_sum=float(gaps.sum()),
        gap_max=float(gaps.max()) if len(gaps) else 0.0,
        signal_sum=float(signals.sum()),
    )


def _gap_metrics(name: str, parts: Sequence[GapSums]) -> dict[str, float]:
    num_tokens = sum(part.num_tokens for part in parts)
    if num_tokens == 0:
        return {}
    gap_sum, signal_sum = sum(part.gap_sum for part in parts), sum(part.signal_sum for part in parts)
    return {
        f"{name}_max": max(part.gap_max for part in parts),
        f"{name}_mean": gap_sum / num_tokens,
        f"{name}_relative": gap_sum / max(signal_sum, _TINY),
    }
