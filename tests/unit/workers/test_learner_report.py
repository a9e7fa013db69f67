from dataclasses import replace

import numpy as np
import pytest
import torch
from groups import make_group

from opd_ray.config.objective import DivergenceKind, ObjectiveConfig, ObjectiveKind
from opd_ray.objectives import Losses
from opd_ray.protocol import RECORDED_VERSION, SampledScore, ScoreSummary
from workers.learner.inputs import ScoredSequence, split_groups
from workers.learner.objective import sampled_tokens
from workers.learner.report import (
    GapSums,
    RankReport,
    Totals,
    combine,
    combine_updates,
    estimate_name,
    teacher_metrics,
)

NO_GAPS = GapSums(num_tokens=0, gap_sum=0.0, gap_max=0.0, signal_sum=0.0)
REPORT = RankReport(
    loss_sum=6.0,
    denominator=3.0,
    divergence_sum=3.0,
    num_tokens=3,
    num_sampled=4,
    stat_sums={"signal": 1.5},
    diagnostic_sums={},
    num_diagnosed=0,
    fresh_gaps=GapSums(num_tokens=3, gap_sum=0.015, gap_max=0.01, signal_sum=0.6),
    stale_gaps=NO_GAPS,
    recorded_gaps=NO_GAPS,
    age_sum=0.0,
    age_max=0,
    num_recorded=0,
    grad_norm=0.5,
    lr=1e-3,
    learn_s=2.0,
)


def sequences(*lengths: int, masked: tuple[int, ...] = ()) -> list[ScoredSequence]:
    """Return one group's trajectories; token n of the group has the version n and the sampler's log-prob -n/10."""
    group = make_group([1], *([5] * length for length in lengths), masked=masked)
    score = SampledScore(logprobs_N=np.zeros(sum(lengths), dtype=np.float32))
    return split_groups([group], [score], sampled_tokens([group], [score]), teachers=["teacher"])


def losses(
    loss: list[float],
    divergence: list[float],
    logprobs: list[float],
    *,
    stats: dict[str, list[float]] | None = None,
    diagnostics: dict[str, list[float]] | None = None,
) -> Losses:
    return Losses(
        loss=torch.tensor(2 * sum(loss), dtype=torch.float32, requires_grad=True),  # every token weighs 2
        loss_N=torch.tensor(loss, dtype=torch.float32),
        divergence_N=torch.tensor(divergence, dtype=torch.float32),
        sampled_logprobs_N=torch.tensor(logprobs, dtype=torch.float32),
        stats={name: torch.tensor(values) for name, values in {"signal": [0.5] * len(loss), **(stats or {})}.items()},
        diagnostics={name: torch.tensor(values) for name, values in (diagnostics or {}).items()},
    )


def report_of(totals: Totals) -> RankReport:
    return totals.report(denominator=3.0, grad_norm=0.5, lr=1e-3, learn_s=2.0)


def test_a_ranks_sums_run_over_all_its_micro_batches_and_only_over_tokens_with_a_loss():
    totals = Totals(version=3)
    totals.add(losses([1.0, 0.0], [0.5, 0.0], [0.0, -0.1]), sequences(1, 1, masked=(1,)))
    totals.add(losses([2.0, 3.0], [0.25, 0.25], [0.0, -0.1]), sequences(2))
    report = report_of(totals)
    assert (report.loss_sum, report.divergence_sum, report.num_tokens, report.num_sampled) == (12.0, 1.0, 3, 4)
    assert report.age_sum == 3 + (3 + 2)
    assert (report.grad_norm, report.lr, report.learn_s) == (0.5, 1e-3, 2.0)


def test_the_gap_of_fresh_sequences_is_kept_apart_from_that_of_older_ones():
    totals = Totals(version=2)  # of the versions 0, 1, 2 the last is fresh
    totals.add(losses([0, 0, 0], [0, 0, 0], [0.5, -0.1 - 0.25, -0.2 + 0.125]), sequences(1, 1, 1))
    report = report_of(totals)
    assert report.fresh_gaps.gap_max == pytest.approx(0.125)
    assert report.stale_gaps.gap_max == pytest.approx(0.5)


def test_the_gap_counts_a_sequence_that_ran_across_an_update_by_its_oldest_token():
    totals = Totals(version=2)
    totals.add(losses([0, 0, 0], [0, 0, 0], [0.0, -0.1 - 0.25, -0.2 + 0.125]), sequences(1, 2))
    report = report_of(totals)
    assert report.fresh_gaps == NO_GAPS
    assert report.stale_gaps.gap_max == pytest.approx(0.25)
    assert report.age_sum == 2 + 1 + 0


def test_the_gap_leaves_out_masked_tokens():
    totals = Totals(version=0)
    totals.add(losses([0, 0], [0, 0], [0.0, 99.0]), sequences(2, masked=(1,)))
    report = report_of(totals)
    assert report.fresh_gaps.gap_max == 0.0
    assert report.stale_gaps == NO_GAPS


def test_the_gap_is_taken_over_the_diagnosed_tokens_where_the_objective_gives_no_logprobs():
    totals = Totals(version=1)
    diagnosed = {"sampled_logprob": [0.25, -0.1 - 0.5], "student_entropy": [1.0, 1.0]}
    totals.add(losses([0, 0, 0], [0, 0, 0], [], diagnostics=diagnosed), sequences(1, 2))
    totals.add(losses([0, 0, 0], [0, 0, 0], []), sequences(3))
    report = report_of(totals)
    assert report.stale_gaps.gap_max == pytest.approx(0.25)
    assert report.fresh_gaps.gap_max == pytest.approx(0.5)
    assert report.num_tokens == 6


def test_a_masked_token_that_was_diagnosed_shows_no_gap():
    totals = Totals(version=1)
    diagnosed = {"sampled_logprob": [99.0, -0.1 - 0.5], "student_entropy": [0.0, 1.0]}
    totals.add(losses([0, 0, 0], [0, 0, 0], [], diagnostics=diagnosed), sequences(1, 2, masked=(0,)))
    report = report_of(totals)
    assert (report.fresh_gaps.gap_max, report.stale_gaps) == (pytest.approx(0.5), NO_GAPS)


def test_the_logprobs_of_all_tokens_go_before_those_of_the_diagnosed():
    totals = Totals(version=3)
    diagnosed = {"sampled_logprob": [77.0], "student_entropy": [1.0]}
    totals.add(losses([0, 0], [0, 0], [0.0, -0.1 + 0.125], diagnostics=diagnosed), sequences(2))
    assert report_of(totals).stale_gaps.gap_max == pytest.approx(0.125)


def test_the_mean_gap_and_the_signal_are_over_the_same_tokens():
    totals = Totals(version=1)  # the first sequence is stale, the second token of the second is masked
    of_signal = {"signal": [8.0, 0.25, 99.0, 0.5]}
    totals.add(losses([0] * 4, [0] * 4, [0.5, -0.1 - 0.25, 0.0, -0.3], stats=of_signal), sequences(1, 3, masked=(2,)))
    fresh = report_of(totals).fresh_gaps
    assert (fresh.num_tokens, fresh.gap_sum, fresh.gap_max) == (2, pytest.approx(0.25), pytest.approx(0.25))
    assert fresh.signal_sum == 0.75
    stale = report_of(totals).stale_gaps
    assert (stale.num_tokens, stale.gap_sum, stale.signal_sum) == (1, 0.5, 8.0)


def test_the_signal_beside_the_gap_is_that_of_the_diagnosed_tokens_alone():
    totals = Totals(version=1)
    diagnosed = {"sampled_logprob": [-0.1], "student_entropy": [1.0]}
    totals.add(losses([0, 0], [0, 0], [], stats={"signal": [3.0, 5.0]}, diagnostics=diagnosed), sequences(2))
    assert report_of(totals).stale_gaps.signal_sum == 3.0


def test_no_gap_is_known_where_nothing_gives_logprobs():
    totals = Totals(version=0)
    totals.add(losses([0, 0], [0, 0], []), sequences(2))
    report = report_of(totals)
    assert (report.fresh_gaps, report.stale_gaps) == (NO_GAPS, NO_GAPS)


def test_stats_are_summed_over_micro_batches_and_diagnostics_with_the_number_of_unmasked_tokens_they_cover():
    totals = Totals(version=0)
    first = losses(
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [],
        stats={"support_teacher_mass": [0.5, 0.0, 0.75, 1.0]},
        diagnostics={
            "sampled_logprob": [0, 0, -0.2],
            "student_entropy": [1.5, 0, 0.25],
            "support_student_mass": [0.5, 0, 1],
        },
    )
    totals.add(first, sequences(4, masked=(1,)))
    totals.add(losses([0, 0], [0, 0], [], stats={"support_teacher_mass": [0.25, 0.25]}), sequences(2))
    report = report_of(totals)
    assert report.stat_sums == {"signal": 3.0, "support_teacher_mass": 2.75}
    assert report.diagnostic_sums == {"student_entropy": 1.75, "support_student_mass": 1.5}
    assert report.num_diagnosed == 2
    assert report.num_tokens == 5


def test_an_empty_micro_batch_adds_nothing():
    totals = Totals(version=0)
    (sequence,) = sequences(2)
    totals.add(losses([0, 0], [0, 0], [5.0, 5.0]), [sequence.without_loss()])
    report = report_of(totals)
    assert (report.loss_sum, report.num_tokens, report.age_sum) == (0.0, 0, 0.0)
    assert (report.fresh_gaps, report.stale_gaps) == (NO_GAPS, NO_GAPS)


def test_the_metrics_of_an_update_are_means_over_the_tokens_of_all_ranks():
    other = replace(
        REPORT,
        loss_sum=2.0,
        denominator=1.0,
        divergence_sum=5.0,
        num_tokens=1,
        age_sum=2.0,
        age_max=2,
        learn_s=3.0,
        fresh_gaps=GapSums(num_tokens=1, gap_sum=0.5, gap_max=0.5, signal_sum=0.43),
        stat_sums={"signal": 0.5},
    )
    assert combine([REPORT, other], estimate="reverse_kl_support") == {
        "train/loss": 2.0,
        "train/grad_norm": 0.5,
        "train/lr": 1e-3,
        "train/token_age_mean": 0.5,
        "train/token_age_max": 2,
        "train/kept_token_fraction": 0.5,
        "distill/reverse_kl_support": 2.0,
        "time/learn_s": 3.0,
        "distill/signal": 0.5,
        "rollout/logprob_gap_max": 0.5,
        "rollout/logprob_gap_mean": pytest.approx(0.515 / 4),
        "rollout/logprob_gap_relative": pytest.approx(0.5),
    }


def test_a_gap_that_no_token_could_show_is_left_out():
    stale = replace(REPORT, fresh_gaps=NO_GAPS, stale_gaps=REPORT.fresh_gaps)
    metrics = combine([stale], estimate="jsd_full")
    assert "rollout/logprob_gap_max" not in metrics
    assert metrics["rollout/logprob_gap_stale_max"] == 0.01
    assert metrics["rollout/logprob_gap_stale_mean"] == pytest.approx(0.005)
    assert metrics["rollout/logprob_gap_stale_relative"] == pytest.approx(0.025)
    silent = combine([replace(REPORT, fresh_gaps=NO_GAPS)], estimate="jsd_full")
    assert not any(name.startswith("rollout/") for name in silent)


def test_a_rank_without_tokens_does_not_disturb_the_means():
    empty = replace(REPORT, loss_sum=0.0, denominator=0.0, divergence_sum=0.0, num_tokens=0, fresh_gaps=NO_GAPS)
    assert combine([REPORT, empty], estimate="jsd_full")["train/loss"] == 2.0


def test_an_update_without_any_token_that_counts_has_metrics_of_zero():
    empty = replace(REPORT, loss_sum=0.0, denominator=0.0, divergence_sum=0.0, num_tokens=0, fresh_gaps=NO_GAPS)
    metrics = combine([empty, empty], estimate="jsd_full")
    assert (metrics["train/loss"], metrics["distill/jsd_full"], metrics["train/kept_token_fraction"]) == (0, 0, 0)


def test_the_ratios_of_the_policy_gradient_become_their_mean_and_the_effective_share_of_samples():
    # ratios 1, 2 and 0.5 on one rank, 0.5 on the other
    first = {"signal": 0.0, "ratio": 3.5, "ratio_squared": 5.25, "ratio_clipped": 1.0, "reward_clipped": 2.0}
    second = {"signal": 0.0, "ratio": 0.5, "ratio_squared": 0.25, "ratio_clipped": 0.0, "reward_clipped": 1.0}
    reports = [replace(REPORT, stat_sums=first), replace(REPORT, stat_sums=second, num_tokens=1)]
    metrics = combine(reports, estimate="reverse_kl_sampled")
    assert metrics["train/ratio_mean"] == 1.0
    assert metrics["train/ess_fraction"] == pytest.approx(4.0**2 / (4 * 5.5))  # (sum)^2 / (n * sum of squares)
    assert metrics["train/ratio_clipped_fraction"] == 0.25
    assert metrics["train/reward_clipped_fraction"] == 0.75


def test_equal_ratios_have_an_effective_share_of_one_and_no_token_at_all_gives_zero():
    equal = {"signal": 0.0, "ratio": 1.5, "ratio_squared": 0.75, "ratio_clipped": 0.0, "reward_clipped": 0.0}
    assert combine([replace(REPORT, stat_sums=equal)], estimate="x")["train/ess_fraction"] == pytest.approx(1.0)
    nothing = replace(REPORT, stat_sums=dict.fromkeys(equal, 0.0), num_tokens=0)
    assert combine([nothing], estimate="x")["train/ess_fraction"] == 0.0


def test_the_teachers_mass_is_a_mean_over_all_tokens_and_diagnostics_one_over_the_diagnosed():
    given = replace(
        REPORT,
        stat_sums={"signal": 0.0, "support_teacher_mass": 2.25},
        diagnostic_sums={"student_entropy": 3.0, "support_student_mass": 1.5},
        num_diagnosed=2,
    )
    other = replace(given, stat_sums={"signal": 0.0, "support_teacher_mass": 0.75}, num_tokens=1, num_diagnosed=1)
    metrics = combine([given, other], estimate="reverse_kl_support")
    assert metrics["distill/support_teacher_mass"] == 0.75
    assert metrics["distill/student_entropy"] == 2.0
    assert metrics["distill/support_student_mass"] == 1.0
    assert not any("ratio" in name for name in metrics)


def test_a_rank_whose_diagnosed_tokens_are_all_masked_does_not_disturb_the_means_of_the_others():
    seen = replace(REPORT, diagnostic_sums={"student_entropy": 3.0}, num_diagnosed=2)
    masked = replace(REPORT, diagnostic_sums={"student_entropy": 0.0}, num_diagnosed=0)
    assert combine([masked, seen], estimate="x")["distill/student_entropy"] == 1.5
    assert "distill/student_entropy" not in combine([masked], estimate="x")


@pytest.mark.parametrize(
    ("kind", "divergence", "name"),
    [
        ("support", "reverse_kl", "reverse_kl_support"),
        ("support", "jsd", "jsd_support"),
        ("full", "forward_kl", "forward_kl_full"),
        ("full", "skewed_reverse_kl", "skewed_reverse_kl_full"),
        ("sampled", "reverse_kl", "reverse_kl_sampled"),
        ("sampled", "jsd", "reverse_kl_sampled"),
    ],
)
def test_the_metric_of_the_divergence_says_what_is_estimated_and_how(kind: str, divergence: str, name: str):
    assert estimate_name(ObjectiveConfig(kind=ObjectiveKind(kind), divergence=DivergenceKind(divergence))) == name


def test_what_the_teacher_sent_and_dropped_is_a_mean_over_tokens():
    summaries = [
        ScoreSummary(num_tokens=3, num_bytes=60, dropped_mass_sum=0.3, score_s=1.0),
        ScoreSummary(num_tokens=1, num_bytes=20, dropped_mass_sum=0.5, score_s=2.0),
    ]
    metrics = teacher_metrics(summaries)
    assert metrics == pytest.approx(
        {"teacher/bytes_per_token": 20, "teacher/score_s_mean": 1.5, "teacher/dropped_mass": 0.2}
    )
    unknown = [replace(summary, dropped_mass_sum=float("nan")) for summary in summaries]
    assert teacher_metrics([unknown[0], summaries[1]])["teacher/dropped_mass"] == 0.5
    assert teacher_metrics(unknown).keys() == {"teacher/bytes_per_token", "teacher/score_s_mean"}


def test_tokens_that_an_earlier_run_recorded_have_no_age_and_a_gap_of_their_own():
    group = replace(make_group([1], [5, 5], masked=(1,)), token_versions=np.full(2, RECORDED_VERSION, dtype=np.int32))
    score = SampledScore(logprobs_N=np.zeros(2, dtype=np.float32))
    recorded = split_groups([group], [score], sampled_tokens([group], [score]), teachers=["teacher"])
    totals = Totals(version=3)
    totals.add(losses([1.0, 1.0], [1.0, 1.0], [-0.5, -9.0]), recorded)
    report = report_of(totals)
    assert (report.recorded_gaps.num_tokens, report.recorded_gaps.gap_max) == (1, 0.5)
    assert report.fresh_gaps == report.stale_gaps == NO_GAPS
    assert (report.num_recorded, report.age_sum) == (1, 0.0)
    metrics = combine([report], estimate="reverse_kl_sampled")
    assert metrics["rollout/logprob_gap_recorded_max"] == 0.5
    assert not {"train/token_age_mean", "rollout/logprob_gap_max", "rollout/logprob_gap_stale_max"} & metrics.keys()

    totals.add(losses([1.0, 1.0], [1.0, 1.0], [0.0, -0.2]), sequences(2))  # of versions 0 and 1
    mixed = combine([report_of(totals)], estimate="reverse_kl_sampled")
    assert mixed["train/token_age_mean"] == (3 + 2) / 2
    assert mixed["rollout/logprob_gap_stale_max"] == pytest.approx(0.1)


def test_the_oldest_token_is_the_greatest_age_over_micro_batches_and_ranks():
    totals = Totals(version=4)
    totals.add(losses([0, 0], [0, 0], [0.0, -0.1]), sequences(2, masked=(0,)))  # ages 4 (masked), 3
    totals.add(losses([0, 0], [0, 0], [0.0, -0.1]), sequences(2, masked=(0, 1)))
    report = report_of(totals)
    assert report.age_max == 3
    assert combine([REPORT, report], estimate="reverse_kl_full")["train/token_age_max"] == 3


def test_a_batchs_later_updates_are_measured_apart_from_the_policy_that_sampled_it():
    totals = Totals(version=0, part=1)
    totals.add(losses([0, 0], [0, 0], [0.5, -0.1]), sequences(1, 1))
    report = report_of(totals)
    assert report.fresh_gaps == NO_GAPS
    assert report.stale_gaps.gap_max == pytest.approx(0.5)


def test_the_metrics_of_several_updates_are_means_over_their_tokens_sums_of_their_times_and_the_last_rate():
    second = replace(REPORT, loss_sum=2.0, denominator=1.0, num_tokens=1, grad_norm=1.5, lr=1e-4, learn_s=1.0)
    slower = replace(REPORT, learn_s=5.0)
    metrics = combine_updates([[REPORT, slower], [second, second]], estimate="reverse_kl_full")
    assert metrics["train/num_updates"] == 2
    assert metrics["train/loss"] == pytest.approx((6 + 6 + 2 + 2) / (3 + 3 + 1 + 1))
    assert metrics["distill/reverse_kl_full"] == pytest.approx((3 + 3 + 3 + 3) / (3 + 3 + 1 + 1))
    assert (metrics["train/grad_norm"], metrics["train/grad_norm_max"]) == (pytest.approx(1.0), 1.5)
    assert metrics["train/lr"] == 1e-4
    assert metrics["time/learn_s"] == 5.0 + 1.0
    assert "train/grad_norm_max" not in combine_updates([[REPORT]], estimate="reverse_kl_full")


def test_the_share_of_negative_rewards_is_over_the_tokens_of_all_ranks():
    given = replace(REPORT, stat_sums={"signal": 0.0, "negative_reward": 2.0}, num_tokens=3)
    other = replace(REPORT, stat_sums={"signal": 0.0, "negative_reward": 0.0}, num_tokens=1)
    assert combine([given, other], estimate="x")["train/negative_reward_fraction"] == 0.5
    assert "train/negative_reward_fraction" not in combine([REPORT], estimate="x")
