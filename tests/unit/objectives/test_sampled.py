"""The sampled objective against its formula by autograd: costs, clips, advantages, options, in float64."""

from dataclasses import replace

import pytest
import torch
from objective_oracles import (
    assert_agrees,
    assert_close,
    gradients,
    losses_of,
    naive_returns,
    naive_sampled,
    random_problem,
)

from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions, SampledSignal

LOG_RATIOS = [0.0, 0.4, -0.4, 0.5, -0.5, 0.6, -0.6, 3.0, -3.0, 100.0, -100.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reward_clip", [None, 0.7])
def test_value_and_gradients_are_those_of_the_formula(
    discount: float, temperature: float, reward_clip: float | None
) -> None:
    problem = random_problem(masked=(2, 5))
    policy = PolicyOptions(discount=discount, reward_clip=reward_clip)
    losses = losses_of("sampled", problem, policy=policy, temperature=temperature, chunk_tokens=4)
    naive_N = naive_sampled(problem, policy=policy, temperature=temperature)
    assert_agrees(losses, naive_N, problem, tolerance=1e-12)


def problem_with_log_ratios(log_ratios: list[float]) -> tuple[object, SampledSignal]:
    problem = random_problem()
    log_p_N = problem.sampled(problem.log_p().detach())
    return problem, SampledSignal(logprobs_N=log_p_N - torch.tensor(log_ratios, dtype=torch.float64))


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_a_reward_clip_bounds_each_cost_counts_what_it_cut_and_leaves_the_divergence(discount: float) -> None:
    """Trap 6: clipping a log-ratio removes or flips gradients, so how often it happens is a statistic."""
    problem, signal = problem_with_log_ratios(LOG_RATIOS)
    policy = PolicyOptions(discount=discount, reward_clip=0.55)
    losses = losses_of("sampled", problem, signal=signal, policy=policy)
    ratios_N = torch.tensor(LOG_RATIOS, dtype=torch.float64)
    clipped_N = torch.tensor([max(-0.55, min(0.55, ratio)) for ratio in LOG_RATIOS], dtype=torch.float64)
    returns_N = naive_returns(clipped_N, offsets=problem.tokens.offsets, discount=discount)
    torch.testing.assert_close(losses.loss_N, returns_N - problem.tokens.advantages_N, rtol=0, atol=1e-9)
    torch.testing.assert_close(losses.divergence_N, ratios_N, rtol=0, atol=1e-9)
    assert losses.stats["reward_clipped"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_without_a_reward_clip_nothing_is_cut_or_counted() -> None:
    problem, signal = problem_with_log_ratios(LOG_RATIOS)
    losses = losses_of("sampled", problem, signal=signal)
    assert losses.stats["reward_clipped"].sum() == 0
    expected_N = torch.tensor(LOG_RATIOS, dtype=torch.float64) - problem.tokens.advantages_N
    torch.testing.assert_close(losses.loss_N, expected_N, rtol=0, atol=1e-9)


def test_masked_tokens_are_not_counted_as_clipped() -> None:
    problem, signal = problem_with_log_ratios([5.0] * 11)
    mask_N = torch.arange(11) % 2 == 0
    masked = replace(problem, tokens=replace(problem.tokens, mask_N=mask_N))
    stats = losses_of("sampled", masked, signal=signal, policy=PolicyOptions(reward_clip=1.0)).stats
    assert torch.equal(stats["reward_clipped"], mask_N.double())
    for name in ("ratio", "ratio_squared", "ratio_clipped"):
        assert torch.equal(stats[name][~mask_N], torch.zeros(5, dtype=torch.float64))


def test_hidden_states_and_log_probs_of_one_teacher_differ_by_the_baseline_alone() -> None:
    problem = random_problem(masked=(3,))
    policy = PolicyOptions(discount=0.9, kl_baseline=True)
    losses = losses_of("sampled", problem, policy=policy, temperature=0.7, chunk_tokens=4)
    plain = losses_of("sampled", problem, policy=replace(policy, kl_baseline=False), temperature=0.7)
    kl_N = losses_of("full", problem, temperature=0.7).loss_N
    torch.testing.assert_close(losses.loss_N, plain.loss_N - kl_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses.divergence_N, plain.divergence_N, rtol=0, atol=1e-12)
    assert_close(losses.stats, plain.stats, 1e-12)
    naive_N = naive_sampled(problem, policy=policy, temperature=0.7)
    ratio_N = naive_N / naive_N.detach().where(problem.tokens.mask_N, 1)
    assert_agrees(losses, naive_N - kl_N * ratio_N, problem, tolerance=1e-12)


def test_hidden_states_bring_no_baseline_that_was_not_asked_for() -> None:
    problem = random_problem(masked=(3,))
    policy = PolicyOptions(discount=0.9)
    plain = losses_of("sampled", problem, policy=policy)
    of_states = losses_of("sampled", problem, policy=policy, signal=problem.signal("hidden"))
    torch.testing.assert_close(of_states.loss_N, plain.loss_N, rtol=0, atol=1e-12)


def test_the_kl_baseline_is_refused_where_the_teacher_sent_sampled_log_probs() -> None:
    problem = random_problem()
    with pytest.raises(ValueError, match=r"^objective\.baseline = kl: .* expected hidden states"):
        losses_of("sampled", problem, policy=PolicyOptions(kl_baseline=True), signal=problem.signal("sampled"))


@pytest.mark.parametrize("poisoned", ["student", "teacher"])
def test_rows_beyond_the_common_vocabulary_change_nothing(poisoned: str) -> None:
    """Trap 8, with the teacher's log-probs and with its hidden states."""
    problem = random_problem()
    for kl_baseline in (False, True):
        results = []
        for scale in (1.0, 100.0):
            heads = {"student": problem.head_VD.detach().clone(), "teacher": problem.teacher_head_VD.clone()}
            heads[poisoned][problem.vocab_size :] *= scale
            padded = replace(problem, head_VD=heads["student"].requires_grad_(), teacher_head_VD=heads["teacher"])
            losses = losses_of("sampled", padded, policy=PolicyOptions(kl_baseline=kl_baseline, discount=0.9))
            results.append((losses.loss_N, losses.sampled_logprobs_N, *gradients(losses.loss, padded)))
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


def test_only_the_kl_baseline_asks_for_hidden_states() -> None:
    for kl_baseline, payload in ((False, "sampled"), (True, "hidden")):
        options = ObjectiveOptions(policy=PolicyOptions(kl_baseline=kl_baseline))
        assert OBJECTIVES["sampled"].payload(options) == payload


def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient() -> None:
    problem = random_problem()
    signal = SampledSignal(logprobs_N=losses_of("sampled", problem).sampled_logprobs_N)
    plain = replace(problem, tokens=replace(problem.tokens, advantages_N=torch.zeros(11)))
    losses = losses_of("sampled", plain, signal=signal, policy=PolicyOptions(discount=0.9))
    for tensor in (losses.loss_N, losses.divergence_N, *gradients(losses.loss, problem)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("objective.discount", {"discount": -0.1}, r"-0\.1: expected a number in \[0, 1\]"),
        ("objective.discount", {"discount": 1.5}, r"1\.5: expected a number in \[0, 1\]"),
        ("objective.discount", {"discount": float("nan")}, r"nan: expected a number in \[0, 1\]"),
        ("objective.reward_clip", {"reward_clip": 0.0}, r"0\.0: expected a number above 0, or null"),
        ("objective.ratio_cap", {"ratio_cap": 0.0}, r"0\.0: expected a number above 0"),
        ("objective.ppo_clip", {"ppo_clip": 1.0}, r"1\.0: expected a number in \(0, 1\)"),
        ("objective.ppo_dual_clip", {"ppo_dual_clip": 1.0}, r"1\.0: expected a number above 1"),
        ("rollout.top_p", {"top_p": 0.0}, r"0\.0: expected a number in \(0, 1\]"),
    ],
)
def test_policy_options_out_of_range_are_refused_by_their_key(key: str, given: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} = {expected}"):
        PolicyOptions(**given)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("rollout.temperature", {"temperature": 0.0}),
        ("vocab_size", {"vocab_size": -1}),
        ("objective.chunk_tokens", {"chunk_tokens": 0}),
        ("diagnostic_tokens", {"diagnostic_tokens": -1}),
        ("objective.entropy_fraction", {"entropy_fraction": 0.0}),
        ("objective.entropy_fraction", {"entropy_fraction": 1.1}),
    ],
)
def test_options_out_of_range_are_refused_by_their_key(key: str, given: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{key} = "):
        ObjectiveOptions(**given)
