from dataclasses import replace

import numpy as np
import pytest
import torch
from groups import make_group

from opd_ray.objectives import TokenLosses
from opd_ray.protocol import SampledScore
from workers.learner.inputs import ScoredSequence, split_groups
from workers.learner.report import RankReport, Totals, combine

REPORT = RankReport(
    loss_sum=6.0,
    divergence_sum=3.0,
    num_tokens=3,
    fresh_gap_max=0.01,
    stale_gap_max=-1.0,
    age_sum=0.0,
    grad_norm=0.5,
    lr=1e-3,
    learn_s=2.0,
)


def sequences(*lengths: int, masked: tuple[int, ...] = ()) -> list[ScoredSequence]:
    """Return one group's trajectories; token n of the group has the version n and the sampler's log-prob -n/10."""
    group = make_group([1], *([5] * length for length in lengths), masked=masked)
    score = SampledScore(logprobs_N=np.zeros(sum(lengths), dtype=np.float32))
    return split_groups([group], [score])


def losses(loss: list[float], divergence: list[float], logprobs: list[float]) -> TokenLosses:
    return TokenLosses(
        loss_N=torch.tensor(loss, dtype=torch.float32, requires_grad=True),
        divergence_N=torch.tensor(divergence, dtype=torch.float32),
        sampled_logprobs_N=torch.tensor(logprobs),
    )


def report_of(totals: Totals) -> RankReport:
    return totals.report(grad_norm=0.5, lr=1e-3, learn_s=2.0)


def test_a_ranks_sums_run_over_all_its_micro_batches_and_only_over_tokens_with_a_loss():
    totals = Totals(version=3)
    totals.add(losses([1.0, 0.0], [0.5, 0.0], [0.0, -0.1]), sequences(1, 1, masked=(1,)))
    totals.add(losses([2.0, 3.0], [0.25, 0.25], [0.0, -0.1]), sequences(2))
    report = report_of(totals)
    assert (report.loss_sum, report.divergence_sum, report.num_tokens) == (6.0, 1.0, 3)
    assert report.age_sum == 3 + (3 + 2)
    assert (report.grad_norm, report.lr, report.learn_s) == (0.5, 1e-3, 2.0)


def test_the_gap_of_fresh_sequences_is_kept_apart_from_that_of_older_ones():
    totals = Totals(version=2)  # of the versions 0, 1, 2 the last is fresh
    totals.add(losses([0, 0, 0], [0, 0, 0], [0.5, -0.1 - 0.25, -0.2 + 0.125]), sequences(1, 1, 1))
    report = report_of(totals)
    assert report.fresh_gap_max == pytest.approx(0.125)
    assert report.stale_gap_max == pytest.approx(0.5)


def test_the_gap_counts_a_sequence_that_ran_across_an_update_by_its_oldest_token():
    totals = Totals(version=2)
    totals.add(losses([0, 0, 0], [0, 0, 0], [0.0, -0.1 - 0.25, -0.2 + 0.125]), sequences(1, 2))
    report = report_of(totals)
    assert report.fresh_gap_max == -1.0
    assert report.stale_gap_max == pytest.approx(0.25)
    assert report.age_sum == 2 + 1 + 0


def test_the_gap_leaves_out_masked_tokens():
    totals = Totals(version=0)
    totals.add(losses([0, 0], [0, 0], [0.0, 99.0]), sequences(2, masked=(1,)))
    report = report_of(totals)
    assert report.fresh_gap_max == 0.0
    assert report.stale_gap_max == -1.0


def test_the_gap_is_taken_over_the_leading_tokens_whose_logprob_the_objective_gives():
    totals = Totals(version=1)
    totals.add(losses([0, 0, 0], [0, 0, 0], [0.25]), sequences(3))
    report = report_of(totals)
    assert (report.fresh_gap_max, report.stale_gap_max) == (-1.0, 0.25)
    assert report.num_tokens == 3


def test_an_empty_micro_batch_adds_nothing():
    totals = Totals(version=0)
    (sequence,) = sequences(2)
    totals.add(losses([0, 0], [0, 0], [5.0, 5.0]), [sequence.without_loss()])
    report = report_of(totals)
    assert (report.loss_sum, report.num_tokens, report.age_sum) == (0.0, 0, 0.0)
    assert (report.fresh_gap_max, report.stale_gap_max) == (-1.0, -1.0)


def test_the_metrics_of_an_update_are_means_over_the_tokens_of_all_ranks():
    other = replace(REPORT, loss_sum=2.0, divergence_sum=5.0, num_tokens=1, age_sum=2.0, learn_s=3.0, fresh_gap_max=0.5)
    assert combine([REPORT, other], objective="support") == {
        "train/loss": 2.0,
        "train/grad_norm": 0.5,
        "train/lr": 1e-3,
        "train/token_age_mean": 0.5,
        "distill/reverse_kl_support": 2.0,
        "time/learn_s": 3.0,
        "rollout/logprob_gap_max": 0.5,
    }


def test_a_gap_that_no_token_could_show_is_left_out():
    stale = replace(REPORT, fresh_gap_max=-1.0, stale_gap_max=0.25)
    metrics = combine([stale], objective="full")
    assert "rollout/logprob_gap_max" not in metrics
    assert metrics["rollout/logprob_gap_stale_max"] == 0.25
    assert not any(name.startswith("rollout/") for name in combine([replace(REPORT, fresh_gap_max=-1.0)], objective=""))


def test_a_rank_without_tokens_does_not_disturb_the_means():
    empty = replace(REPORT, loss_sum=0.0, divergence_sum=0.0, num_tokens=0, fresh_gap_max=-1.0)
    assert combine([REPORT, empty], objective="full")["train/loss"] == 2.0
