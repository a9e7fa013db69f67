import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from config_files import refusal
from groups import make_group

from opd_ray.config.objective import (
    BaselineKind,
    DivergenceKind,
    MaskConfig,
    Normalisation,
    ObjectiveConfig,
    ObjectiveKind,
    RatioKind,
    TailKind,
    WeightConfig,
)
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.objectives import (
    OBJECTIVES,
    Divergence,
    ObjectiveOptions,
    PolicyOptions,
    SampledSignal,
    Tokens,
    forward_kl,
    generalised_jsd,
    mixed_kl,
    reverse_kl,
    skewed_reverse_kl,
)
from opd_ray.protocol import HiddenScore, SampledScore, Score, TrajectoryGroup
from opd_ray.requests import ObjectiveIds, objective_ids
from workers.learner.objective import ObjectiveSetup, TokenPlan, TokenPlanner, objective_options, removed_ids
from workers.support_codec import pack_support

EOS, PAD, UNNAMED = 12, 13, 14  # the id of a digit is the digit; the last is a padding row of the head, no token
NO_LOGPROBS = np.empty(0, dtype=np.float32)


def make_setup(loss_weights: Mapping[str, float] | None = None, **objective: object) -> ObjectiveSetup:
    config = ObjectiveConfig(**{"kind": ObjectiveKind.sampled, **objective})
    return ObjectiveSetup(
        config=config,
        ids=objective_ids(config, tokenizer=build_tokenizer()),
        temperature=0.7,
        top_p=0.9,
        vocab_size=14,
        loss_weights=loss_weights or {},
    )


def make_scores(groups: Sequence[TrajectoryGroup], seed: int = 0) -> list[SampledScore]:
    generator = np.random.default_rng(seed)
    return [
        SampledScore(logprobs_N=-generator.exponential(0.5, len(group.response_ids)).astype(np.float32))
        for group in groups
    ]


def plan_of(groups: Sequence[TrajectoryGroup], scores: Sequence[Score] = (), **objective: object) -> TokenPlan:
    planner = TokenPlanner(make_setup(**objective), tokenizer=build_tokenizer())
    return planner.plan(groups, scores or make_scores(groups))


def masked_by(groups: Sequence[TrajectoryGroup], **mask: object) -> list[int]:
    """Return which tokens the mask takes out."""
    plan = plan_of(groups, mask=MaskConfig(**mask))
    return [n for n, kept in enumerate(plan.kept_N.tolist()) if not kept]


def split(values: Sequence[float], groups: Sequence[TrajectoryGroup]) -> list[list[list[float]]]:
    """Return the values of all tokens by group and response."""
    rest = iter(values)
    return [[list(itertools.islice(rest, b - a)) for a, b in itertools.pairwise(group.offsets)] for group in groups]


# Of 4 + 3 + 2 and 1 + 3 tokens; the policy did not choose the token 4.
GROUPS = [
    make_group([1], [1, 2, 3, EOS], [EOS, EOS, 2], [3, PAD], masked=(4,), truncated=(2,), rewards=[1.0, 0.0, 0.5]),
    make_group([2], [2], [3, 1, 2], truncated=(0,), rewards=[3.0, 7.0]),
]


def test_without_a_mask_every_token_that_the_policy_chose_counts_alike():
    plan = plan_of(GROUPS)
    assert plan.kept_N.tolist() == [True] * 4 + [False] + [True] * 8
    assert plan.weights_N.tolist() == [1.0] * 4 + [0.0] + [1.0] * 8
    assert plan.advantages_N.tolist() == [0.0] * 13
    assert plan.denominator == 12.0
    assert (plan.weights_N.dtype, plan.advantages_N.dtype) == (torch.float32, torch.float32)


def test_special_tokens_are_masked_wherever_they_stand():
    assert masked_by(GROUPS, tokens=["<eos>"]) == [3, 4, 5]
    assert masked_by(GROUPS, tokens=["<pad>", "2"]) == [1, 4, 6, 8, 9, 12]


def test_special_tokens_are_masked_at_the_first_of_each_in_every_response_alone():
    assert masked_by(GROUPS, tokens=["<eos>"], first_only=True) == [3, 4]
    assert masked_by(GROUPS, tokens=["<eos>", "2"], first_only=True) == [1, 3, 4, 6, 9, 12]


def test_a_span_of_text_is_masked_in_every_response_that_holds_all_of_it():
    assert masked_by(GROUPS, text=["23"]) == [1, 2, 4]
    assert masked_by(GROUPS, text=["12", "3"]) == [0, 1, 2, 4, 7, 10, 11, 12]


def test_a_span_does_not_run_from_one_response_or_group_into_the_next():
    assert masked_by([make_group([1], [1, 2], [3]), make_group([1], [4])], text=["23", "34"]) == []


def test_a_span_may_cut_through_a_token_and_special_tokens_stand_for_their_own_text():
    assert masked_by([make_group([1], [1, EOS, 2])], text=["1<e"]) == [0, 1]


def test_an_id_that_is_no_token_has_no_text():
    assert masked_by([make_group([1], [1, UNNAMED, 2, UNNAMED])], text=["12"]) == [0, 1, 2]


def test_responses_that_hit_the_limit_are_masked_whole():
    assert masked_by(GROUPS, truncated=True) == [4, 7, 8, 9]


def test_responses_of_another_format_are_masked_whole():
    assert masked_by(GROUPS, format="[12]$") == [0, 1, 2, 3, 4, 7, 8]
    assert masked_by(GROUPS, format=r"^\d+<eos>$") == list(range(4, 13))
    assert masked_by(GROUPS, format="") == [4]


def test_masks_compose_and_none_hides_a_token_from_another():
    alone = [
        {"tokens": ["<eos>"], "first_only": True},
        {"text": ["3<eos>", "31"]},
        {"truncated": True},
        {"format": "2"},
    ]
    together = {name: value for mask in alone for name, value in mask.items()}
    expected = sorted({n for mask in alone for n in masked_by(GROUPS, **mask)})
    assert masked_by(GROUPS, **together) == expected == [2, 3, 4, 7, 8, 9, 10, 11]


def test_masked_tokens_have_no_weight_and_enter_no_denominator():
    plan = plan_of(GROUPS, mask=MaskConfig(tokens=["2"]))
    assert plan.weights_N.tolist() == [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0]
    assert plan.denominator == 8.0


def test_under_the_sequence_mean_the_tokens_of_a_response_weigh_as_much_as_those_of_any_other():
    plan = plan_of(GROUPS, normalisation=Normalisation.sequence_mean, mask=MaskConfig(tokens=["2"]))
    third = pytest.approx(1 / 3)
    assert plan.weights_N.tolist() == [third, 0, third, third, 0, 1, 0, 0.5, 0.5, 0, 0.5, 0.5, 0]
    assert plan.denominator == 4.0  # the response `2` has no loss


@pytest.mark.parametrize(("fraction", "with_loss"), [(0.5, [2, 1, 1, 1, 2]), (0.1, [1] * 5), (1.0, [4, 2, 2, 1, 3])])
def test_where_high_entropy_alone_has_a_loss_the_means_are_over_the_tokens_that_have_one(
    fraction: float, with_loss: list[int]
):
    weight = WeightConfig(entropy_fraction=fraction)
    token_mean = plan_of(GROUPS, weight=weight)
    assert token_mean.denominator == sum(with_loss)
    assert token_mean.weights_N.tolist() == token_mean.kept_N.tolist()
    sequence_mean = plan_of(GROUPS, weight=weight, normalisation=Normalisation.sequence_mean)
    assert sequence_mean.denominator == 5.0
    by_response = itertools.chain(*split(sequence_mean.weights_N.tolist(), GROUPS))
    kept = itertools.chain(*split(sequence_mean.kept_N.tolist(), GROUPS))
    for weights, keeps, num_with_loss in zip(by_response, kept, with_loss, strict=True):
        assert weights == [pytest.approx(1 / num_with_loss) if keep else 0 for keep in keeps]


PARTS = list(
    itertools.product(Normalisation, (1.0, 0.4), (MaskConfig(), MaskConfig(tokens=["2", "<eos>"], truncated=True)))
)


@pytest.mark.parametrize(("normalisation", "fraction", "mask"), PARTS)
def test_the_parts_of_a_batch_say_together_what_the_whole_says(
    normalisation: Normalisation, fraction: float, mask: MaskConfig
):
    weight = WeightConfig(entropy_fraction=fraction, half_life_tokens=3, drift_rate=0.5)
    given = {
        "normalisation": normalisation,
        "mask": mask,
        "weight": weight,
        "baseline": BaselineKind.group_mean,
        "discount": 0.9,
        "task_reward_weight": 2.0,
    }
    scores = make_scores(GROUPS)
    whole = plan_of(GROUPS, scores, **given)
    parts = [plan_of([group], [score], **given) for group, score in zip(GROUPS, scores, strict=True)]
    assert whole.denominator == sum(part.denominator for part in parts)
    for name in ("kept_N", "weights_N", "advantages_N"):
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_weights_halve_with_every_half_life_from_the_start_of_each_response():
    weights = plan_of(GROUPS, weight=WeightConfig(half_life_tokens=2.0)).weights_N.tolist()
    r = math.sqrt(0.5)
    first = [[1, r, 0.5, r / 2], [0, r, 0.5], [1, r]]
    assert split(weights, GROUPS) == [[pytest.approx(w) for w in group] for group in (first, [[1], [1, r, 0.5]])]


def naive_drift(costs: list[float], rate: float) -> list[float]:
    """Return exp(-rate * max(0, the costs before the token)) for each token of a response."""
    return [math.exp(-rate * max(0.0, math.fsum(costs[:t]))) for t in range(len(costs))]


def naive_costs(
    groups: Sequence[TrajectoryGroup], scores: Sequence[SampledScore], kept: Sequence[bool]
) -> list[list[list[float]]]:
    costs = [
        float(sampler) - float(teacher)
        for group, score in zip(groups, scores, strict=True)
        for sampler, teacher in zip(group.sampled_logprobs, score.logprobs_N, strict=True)
    ]
    return split([cost if keep else 0.0 for cost, keep in zip(costs, kept, strict=True)], groups)


@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(tokens=["2"])])
def test_a_prefix_that_has_drifted_from_the_teacher_weighs_less(mask: MaskConfig):
    scores = make_scores(GROUPS)
    plan = plan_of(GROUPS, scores, mask=mask, weight=WeightConfig(drift_rate=0.8))
    costs = naive_costs(GROUPS, scores, plan.kept_N.tolist())
    drifts = [drift for group in costs for response in group for drift in naive_drift(response, 0.8)]
    expected = [drift if keep else 0.0 for drift, keep in zip(drifts, plan.kept_N.tolist(), strict=True)]
    assert plan.weights_N.tolist() == pytest.approx(expected, rel=1e-5)
    assert min(w for w in expected if w) < 0.8  # the case has drift in it


def test_the_drift_is_the_same_whatever_score_tells_the_sampled_logprobs():
    sampled = make_scores(GROUPS)
    as_support = [
        pack_support(
            np.zeros((len(s.logprobs_N), 1), dtype=np.int32),
            np.full((len(s.logprobs_N), 1), -50, dtype=np.float32),
            sampled_logprobs_N=s.logprobs_N,
        )
        for s in sampled
    ]
    as_hidden = [
        HiddenScore(hidden_ND=np.zeros((len(s.logprobs_N), 2), np.float32), sampled_logprobs_N=s.logprobs_N)
        for s in sampled
    ]
    plans = [plan_of(GROUPS, s, weight=WeightConfig(drift_rate=0.8)) for s in (sampled, as_support, as_hidden)]
    assert torch.equal(plans[0].weights_N, plans[1].weights_N)
    assert torch.equal(plans[0].weights_N, plans[2].weights_N)


def test_a_teacher_that_says_nothing_of_the_sampled_tokens_gives_the_plan_without_drift():
    scores = [
        HiddenScore(hidden_ND=np.zeros((len(g.response_ids), 2), dtype=np.float32), sampled_logprobs_N=NO_LOGPROBS)
        for g in GROUPS
    ]
    given, expected = plan_of(GROUPS, scores), plan_of(GROUPS)
    assert torch.equal(given.weights_N, expected.weights_N)
    assert given.denominator == expected.denominator


def test_normalisation_half_life_and_drift_multiply():
    scores = make_scores(GROUPS)
    rules = [
        {"normalisation": Normalisation.sequence_mean},
        {"weight": WeightConfig(half_life_tokens=3)},
        {"weight": WeightConfig(drift_rate=0.8)},
    ]
    alone = [plan_of(GROUPS, scores, **rule) for rule in rules]
    both = WeightConfig(half_life_tokens=3, drift_rate=0.8)
    together = plan_of(GROUPS, scores, normalisation=Normalisation.sequence_mean, weight=both)
    torch.testing.assert_close(together.weights_N, math.prod(plan.weights_N for plan in alone))
    assert together.denominator == alone[0].denominator == 5.0


def naive_baseline(costs: list[list[float]], *, discount: float, clip: float) -> list[list[float]]:
    """Return for each token the mean over a group's other responses of their cost to go at the same position."""

    def to_go(response: list[float], start: int) -> float:
        return sum(discount ** (t - start) * max(-clip, min(clip, response[t])) for t in range(start, len(response)))

    return [
        [
            sum(to_go(other, t) for j, other in enumerate(costs) if j != i) / max(1, len(costs) - 1)
            for t in range(len(response))
        ]
        for i, response in enumerate(costs)
    ]


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(tokens=["2"])])
def test_the_group_mean_is_that_of_a_double_loop_over_the_prompts_other_samples(
    discount: float, clip: float | None, mask: MaskConfig
):
    groups = [*GROUPS, make_group([3], [1, 3])]  # alone: no other sample, no baseline
    scores = make_scores(groups)
    plan = plan_of(groups, scores, baseline=BaselineKind.group_mean, discount=discount, reward_clip=clip, mask=mask)
    costs = naive_costs(groups, scores, plan.kept_N.tolist())
    expected = [naive_baseline(group, discount=discount, clip=clip or math.inf) for group in costs]
    flat = [value for group in expected for response in group for value in response]
    assert plan.advantages_N.tolist() == pytest.approx(flat, abs=1e-5)
    assert flat[-2:] == [0.0, 0.0]
    assert max(map(abs, flat)) > 0.1


def losses_of_equal_samples(**objective: object) -> torch.Tensor:
    """Return the losses [N] of a group of two equal responses, sampled by the student as it is now."""
    generator = torch.Generator().manual_seed(0)
    states_ND = torch.randn(3, 4, generator=generator).repeat(2, 1)
    head_VD = torch.randn(14, 4, generator=generator)
    group = make_group([1], [5, 6, 7], [5, 6, 7], rewards=[1.0, 0.0])
    ids_N = torch.from_numpy(group.response_ids).long()
    logprobs_N = (states_ND @ head_VD.T).log_softmax(-1).gather(1, ids_N[:, None]).squeeze(1)
    score = SampledScore(logprobs_N=np.array([-1.0, -2.0, -0.5] * 2, dtype=np.float32))
    plan = plan_of([replace(group, sampled_logprobs=logprobs_N.numpy())], [score], **objective)
    options = replace(objective_options(make_setup(**objective)), temperature=1.0)
    tokens = Tokens(
        ids_N=ids_N,
        offsets=torch.from_numpy(group.offsets).long(),
        mask_N=plan.kept_N,
        weights_N=plan.weights_N,
        sampler_logprobs_N=logprobs_N,
        advantages_N=plan.advantages_N,
    )
    signal = SampledSignal(logprobs_N=torch.from_numpy(score.logprobs_N))
    return OBJECTIVES["sampled"].losses(states_ND, head_VD, tokens=tokens, signal=signal, options=options).loss_N


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_the_group_mean_takes_the_whole_loss_away_where_all_samples_are_equal(discount: float):
    plain_N = losses_of_equal_samples(discount=discount)
    assert float(plain_N.abs().min()) > 0.1
    centred_N = losses_of_equal_samples(discount=discount, baseline=BaselineKind.group_mean)
    assert float(centred_N.abs().max()) < 1e-5


def test_a_rewarded_sample_has_a_lower_loss_than_its_equal_without_a_reward():
    loss_N = losses_of_equal_samples(task_reward_weight=0.5)
    plain_N = losses_of_equal_samples()
    torch.testing.assert_close(loss_N[:3], plain_N[:3] - 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss_N[3:], plain_N[3:] + 0.5, atol=1e-4, rtol=0)


def test_task_rewards_are_normalised_in_their_group_and_given_to_every_token_of_a_response():
    plan = plan_of(GROUPS, task_reward_weight=2.0)
    deviation = math.sqrt((0.25 + 0.25 + 0) / 3)  # of 1, 0 and 0.5; that of 3 and 7 is 2
    first = 2.0 * 0.5 / deviation
    expected = [first] * 4 + [-first] * 3 + [0.0] * 2 + [-2.0] + [2.0] * 3
    assert plan.advantages_N.tolist() == pytest.approx(expected, rel=1e-4)


def test_equal_rewards_say_nothing():
    group = make_group([1], [1, 2], [3], rewards=[1.0, 1.0])
    assert plan_of([group], task_reward_weight=2.0).advantages_N.tolist() == [0.0, 0.0, 0.0]


def test_rewards_without_a_weight_say_nothing():
    assert plan_of(GROUPS, task_reward_weight=0.0).advantages_N.tolist() == [0.0] * 13


def test_a_task_reward_and_the_group_mean_add_up():
    alone = [
        plan_of(GROUPS, baseline=BaselineKind.group_mean).advantages_N,
        plan_of(GROUPS, task_reward_weight=2.0).advantages_N,
    ]
    together = plan_of(GROUPS, baseline=BaselineKind.group_mean, task_reward_weight=2.0)
    torch.testing.assert_close(together.advantages_N, alone[0] + alone[1])


def test_a_task_reward_is_refused_where_a_prompt_has_no_answer():
    groups = [GROUPS[0], make_group([2], [2], [3, 1, 2])]
    words = refusal(lambda: plan_of(groups, task_reward_weight=0.5))
    assert words.startswith("objective.task_reward_weight=0.5: prompts without a reference answer have no reward")
    assert "give every prompt an `answer`, or set it to 0" in words
    plan_of(groups)


CHANGED_POLICY = {
    "discount": 0.9,
    "reward_clip": 5.0,
    "ratio_cap": 3.0,
    "ppo_clip": 0.3,
    "ppo_dual_clip": 4.0,
}
CHANGED = {
    **CHANGED_POLICY,
    "baseline": BaselineKind.kl,
    "ratio": RatioKind.ppo,
    "correct_top_p": True,
    "tail": TailKind.bucket,
    "divergence": DivergenceKind.forward_kl,
    "chunk_tokens": 7,
    "weight": WeightConfig(entropy_fraction=0.4),
    "equivalent_tokens": [["<eos>", "<pad>"], ["1", "2"]],
}
# The request to the sampler and the teacher, the plan of tokens or the worker reads these.
ELSEWHERE = {
    *("kind", "use_as", "support", "top_k", "support_top_p", "include_sampled"),
    *("normalisation", "mask", "task_reward_weight", "diagnostic_tokens"),
}
OF_A_DIVERGENCE = {"jsd_beta", "skew_alpha", "forward_weight"}


def without_divergence(options: ObjectiveOptions) -> ObjectiveOptions:
    """Return the options with one fixed divergence: functions are equal to themselves alone."""
    return replace(options, divergence=SAME)


SAME = reverse_kl()


def test_every_number_of_the_configuration_reaches_the_objective():
    assert without_divergence(objective_options(make_setup(**CHANGED))) == ObjectiveOptions(
        temperature=0.7,
        divergence=SAME,
        tail="bucket",
        policy=PolicyOptions(**CHANGED_POLICY, kl_baseline=True, ratio="ppo", top_p=0.9),
        equivalent_ids=((EOS, PAD), (1, 2)),
        entropy_fraction=0.4,
        vocab_size=14,
        chunk_tokens=7,
    )


def test_no_field_of_the_configuration_is_forgotten():
    assert {field.name for field in fields(ObjectiveConfig)} == CHANGED.keys() | ELSEWHERE | OF_A_DIVERGENCE


def test_the_defaults_of_the_configuration_reach_the_objective():
    assert without_divergence(objective_options(make_setup())) == ObjectiveOptions(
        temperature=0.7, divergence=SAME, policy=PolicyOptions(ratio="truncated"), vocab_size=14
    )


@pytest.mark.parametrize("tail", TailKind)
def test_every_tail_of_the_configuration_is_one_of_the_objective(tail: TailKind):
    assert objective_options(make_setup(tail=tail)).tail == tail.value


@pytest.mark.parametrize("ratio", RatioKind)
def test_every_ratio_of_the_configuration_is_one_of_the_objective(ratio: RatioKind):
    assert objective_options(make_setup(ratio=ratio)).policy.ratio == ratio.value


@pytest.mark.parametrize(("baseline", "expected"), [("none", False), ("kl", True), ("group_mean", False)])
def test_the_exact_baseline_alone_is_the_objectives_own(baseline: str, expected: bool):
    options = objective_options(make_setup(baseline=BaselineKind(baseline)))
    assert options.policy.kl_baseline is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"divergence": DivergenceKind.reverse_kl}, reverse_kl()),
        ({"divergence": DivergenceKind.forward_kl}, forward_kl()),
        ({"divergence": DivergenceKind.jsd, "jsd_beta": 0.3}, generalised_jsd(0.3)),
        ({"divergence": DivergenceKind.skewed_reverse_kl, "skew_alpha": 0.4}, skewed_reverse_kl(0.4)),
        ({"divergence": DivergenceKind.mixed_kl, "forward_weight": 0.2}, mixed_kl(0.2)),
    ],
)
def test_each_divergence_is_the_one_that_is_named_with_its_own_number(given: dict[str, object], expected: Divergence):
    generator = torch.Generator().manual_seed(0)
    log_p_NV, log_q_NV = torch.randn(2, 3, 6, generator=generator).log_softmax(-1)
    divergence = objective_options(make_setup(**given)).divergence
    for ours, theirs in zip(divergence(log_p_NV, log_q_NV), expected(log_p_NV, log_q_NV), strict=True):
        assert torch.equal(ours, theirs)
    assert divergence.constant == expected.constant


@pytest.mark.parametrize(("out_of_support", "expected"), [(True, (3, 7)), (False, ())])
def test_masked_ids_leave_the_supports_as_the_ids_that_stand_for_them(out_of_support: bool, expected: tuple[int, ...]):
    setup = ObjectiveSetup(
        config=ObjectiveConfig(kind=ObjectiveKind.support, mask=MaskConfig(out_of_support=out_of_support)),
        ids=ObjectiveIds(masked=(5, 7), equivalent=((3, 5),)),
        temperature=1.0,
        top_p=1.0,
        vocab_size=9,
        loss_weights={},
    )
    assert removed_ids(setup) == expected


OF_TASKS = [
    make_group([1], [1, 2], [3, 1], masked=(1,), task="sort"),
    make_group([1], [2], task="copy"),
    make_group([1], [1, 2, 3], task="exact"),
]


def weights_with(loss_weights: Mapping[str, float], **objective: object) -> TokenPlan:
    planner = TokenPlanner(make_setup(loss_weights, **objective), tokenizer=build_tokenizer())
    return planner.plan(OF_TASKS, make_scores(OF_TASKS))


def test_the_tokens_of_a_task_weigh_what_its_entry_says_and_one_without_entry():
    plan = weights_with({"sort": 0.5, "copy": 3.0})
    assert plan.weights_N.tolist() == [0.5, 0, 0.5, 0.5, 3, 1, 1, 1]
    assert plan.weights_N.dtype is torch.float32


def test_the_weight_of_a_task_changes_neither_what_is_kept_nor_the_denominator_nor_the_advantages():
    objective = {"baseline": BaselineKind.group_mean, "discount": 0.5}
    plain, weighted = weights_with({}, **objective), weights_with({"sort": 0.0, "copy": 3.0}, **objective)
    assert weighted.weights_N.tolist() == [0, 0, 0, 0, 3, 1, 1, 1]
    assert torch.equal(weighted.kept_N, plain.kept_N)
    assert torch.equal(weighted.advantages_N, plain.advantages_N)
    assert weighted.denominator == plain.denominator == 7.0


@pytest.mark.parametrize(
    "objective",
    [
        {"normalisation": Normalisation.sequence_mean},
        {"weight": WeightConfig(half_life_tokens=2.0)},
        {"weight": WeightConfig(drift_rate=0.5)},
    ],
)
def test_the_weight_of_a_task_multiplies_every_other_weight(objective: dict[str, object]):
    factors = torch.tensor([0.5] * 4 + [3.0] + [1.0] * 3)
    plain, weighted = weights_with({}, **objective), weights_with({"sort": 0.5, "copy": 3.0}, **objective)
    torch.testing.assert_close(weighted.weights_N, plain.weights_N * factors)
    assert not torch.equal(weighted.weights_N, plain.weights_N)
