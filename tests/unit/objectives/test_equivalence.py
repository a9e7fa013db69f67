"""Classes of equivalent ids, against the same formulas on merged outcomes by autograd, in float64.

Suffixes: N flat tokens, V vocabulary, W outcomes (classes and single ids), K support.
"""

from dataclasses import replace

import pytest
import torch
from objective_oracles import (
    CASES,
    Case,
    Problem,
    assert_agrees,
    gradients,
    kl_terms,
    losses_of,
    naive_returns,
    random_problem,
)
from torch import Tensor

from opd_ray.objectives import HiddenSignal, PolicyOptions, SampledSignal, SupportSignal, Tail, Tokens
from opd_ray.objectives.equivalence import Equivalence

VOCAB = 12
CLASSES = ((3, 1), (7, 0, 9))  # 3 and 7 stand for them
OUTCOMES = [(3, 1), (7, 0, 9), (2,), (4,), (5,), (6,), (8,), (10,), (11,)]
OUTCOME_OF = {id_: column for column, ids in enumerate(OUTCOMES) for id_ in ids}
FIRST_OF = torch.tensor([ids[0] for ids in OUTCOMES])


def merged(log_NV: Tensor) -> Tensor:
    """Log-probs of the outcomes [N,W]: mass summed over a class."""
    return torch.stack([log_NV[:, list(ids)].logsumexp(-1) for ids in OUTCOMES], dim=-1)


def class_problem() -> Problem:
    """Sampled tokens in classes, first member or not, and outside; one is masked."""
    problem = random_problem(masked=(2,))
    ids_N = torch.tensor([3, 1, 5, 7, 0, 9, 2, 1, 8, 11, 9])
    return replace(problem, tokens=replace(problem.tokens, ids_N=ids_N))


def outcomes(problem: Problem) -> Tensor:
    return torch.tensor([OUTCOME_OF[id_] for id_ in problem.tokens.ids_N.tolist()])


def at_outcome(problem: Problem, log_NW: Tensor) -> Tensor:
    return log_NW.gather(1, outcomes(problem)[:, None]).squeeze(1)


def support_signal(problem: Problem, columns_NK: Tensor) -> SupportSignal:
    """The teacher's mass of each named outcome, under the id that stands for it."""
    log_q_NW = merged(problem.log_q())
    return SupportSignal(
        ids_NK=FIRST_OF[columns_NK],
        logprobs_NK=log_q_NW.gather(1, columns_NK),
        sampled_logprobs_N=at_outcome(problem, log_q_NW),
    )


def random_columns(top_k: int) -> Tensor:
    """Distinct outcomes, the classes in some rows only."""
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(len(OUTCOMES), generator=generator)[:top_k] for _ in range(11)])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_full_divergence_is_that_of_the_merged_outcomes(case: Case) -> None:
    problem = class_problem()
    losses = losses_of("full", problem, equivalent_ids=CLASSES, divergence=case.divergence, chunk_tokens=4)
    merged_N = case.terms(merged(problem.log_p()).exp(), merged(problem.log_q()).exp()).sum(-1)
    assert_agrees(losses, merged_N * problem.tokens.mask_N, problem, tolerance=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tail", ["renormalise", "bucket", "sampled_corrected", "none"])
def test_a_support_counts_a_class_as_one_outcome_with_all_its_mass(tail: Tail, case: Case) -> None:
    problem = class_problem()
    columns_NK = random_columns(5)
    signal = support_signal(problem, columns_NK)
    losses = losses_of(
        "support", problem, signal=signal, tail=tail, equivalent_ids=CLASSES, divergence=case.divergence, chunk_tokens=4
    )
    p_NW, q_NK = merged(problem.log_p()).exp(), signal.logprobs_NK.exp()
    p_NK = p_NW.gather(1, columns_NK)
    if tail == "renormalise":
        naive_N = case.terms(p_NK / p_NK.sum(-1, keepdim=True), q_NK / q_NK.sum(-1, keepdim=True)).sum(-1)
    elif tail == "bucket":
        rest = [1 - x.sum(-1, keepdim=True) for x in (p_NK, q_NK)]
        naive_N = case.terms(torch.cat([p_NK, rest[0]], -1), torch.cat([q_NK, rest[1]], -1)).sum(-1)
    else:
        p_N, q_N = at_outcome(problem, p_NW), signal.sampled_logprobs_N.exp()
        outside_N = (columns_NK != outcomes(problem)[:, None]).all(-1) & (tail == "sampled_corrected")
        assert outside_N.any() == (tail == "sampled_corrected")
        naive_N = case.terms(p_NK, q_NK).sum(-1) + outside_N * case.terms(p_N, q_N) / p_N.detach()
    assert_agrees(losses, naive_N * problem.tokens.mask_N, problem, tolerance=1e-12)


@pytest.mark.parametrize("kl_baseline", [False, True])
@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_the_sampled_cost_is_that_of_the_tokens_class(discount: float, kl_baseline: bool) -> None:
    problem = class_problem()
    log_p_NW, log_q_NW = merged(problem.log_p()), merged(problem.log_q())
    log_p_N, log_q_N = at_outcome(problem, log_p_NW), at_outcome(problem, log_q_NW)
    signal = None if kl_baseline else SampledSignal(logprobs_N=log_q_N)
    policy = PolicyOptions(discount=discount, kl_baseline=kl_baseline)
    losses = losses_of("sampled", problem, signal=signal, policy=policy, equivalent_ids=CLASSES, chunk_tokens=4)
    tokens = problem.tokens
    costs_N = (log_p_N.detach() - log_q_N) * tokens.mask_N
    returns_N = naive_returns(costs_N, offsets=tokens.offsets, discount=discount) - tokens.advantages_N
    if kl_baseline:
        returns_N = returns_N - kl_terms(log_p_NW.detach().exp(), log_q_NW.exp()).sum(-1)
    naive_N = returns_N * (log_p_N - log_p_N.detach()).exp() * tokens.mask_N
    assert_agrees(losses, naive_N, problem, tolerance=1e-12)
    torch.testing.assert_close(losses.divergence_N, costs_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sampled", {}),
        ("full", {}),
        ("support", {"tail": "bucket"}),
        ("support", {"tail": "sampled_corrected"}),
        ("support", {"tail": "none"}),
    ],
)
def test_the_sampled_log_prob_stays_that_of_the_id_itself(name: str, options: dict) -> None:
    problem = class_problem()
    signal = support_signal(problem, random_columns(5)) if name == "support" else None
    losses = losses_of(name, problem, signal=signal, equivalent_ids=CLASSES, **options)
    raw_N = problem.sampled(problem.log_p().detach()) * problem.tokens.mask_N
    torch.testing.assert_close(losses.sampled_logprobs_N, raw_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "none"])
def test_members_of_one_class_in_a_support_count_once(tail: Tail) -> None:
    """The first of them in the row speaks for the class, whichever member it is."""
    problem = class_problem()
    columns_NK = torch.tensor([[0, 1, 4, 5]]).expand(11, -1)
    signal = support_signal(problem, columns_NK)
    named_NK = torch.tensor([[1, 9, 5, 6, 3, 0, 7]]).expand(11, -1)
    named_log_q_NK = torch.cat([signal.logprobs_NK, torch.full((11, 3), -1.0).double()], dim=1)
    doubled = replace(signal, ids_NK=named_NK, logprobs_NK=named_log_q_NK)
    results = [
        losses_of("support", problem, signal=each, tail=tail, equivalent_ids=CLASSES) for each in (signal, doubled)
    ]
    torch.testing.assert_close(results[1].loss_N, results[0].loss_N, rtol=0, atol=1e-12)
    pairs = zip(gradients(results[1].loss, problem), gradients(results[0].loss, problem), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_models_that_differ_in_their_choice_of_equivalent_ids_alone_agree() -> None:
    problem = class_problem()
    eye = torch.eye(VOCAB, dtype=torch.float64)
    logits_NV = problem.log_p().detach()
    swapped_NV = logits_NV[:, [0, 3, 2, 1, *range(4, VOCAB)]].requires_grad_()
    student = replace(problem, hidden_ND=swapped_NV, head_VD=eye)
    signal = HiddenSignal(hidden_ND=logits_NV, head_VD=eye)
    merging, plain = (losses_of("full", student, signal=signal, equivalent_ids=classes) for classes in (((3, 1),), ()))
    assert merging.loss_N.abs().max() < 1e-14
    assert torch.autograd.grad(merging.loss, swapped_NV)[0].abs().max() < 1e-14
    assert plain.loss_N.max() > 0.01


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("ratio", ["none", "truncated", "ppo"])
def test_on_policy_the_ratio_is_one_also_in_a_class(ratio: str, top_p: float) -> None:
    """The sampler's log-prob is that of the id, not of its class."""
    problem, options = class_problem(), {"policy": PolicyOptions(ratio=ratio, top_p=top_p), "equivalent_ids": CLASSES}
    fresh_N = losses_of("sampled", problem, **options).sampled_logprobs_N
    assert top_p < 1 or torch.allclose(fresh_N, problem.sampled(problem.log_p().detach()) * problem.tokens.mask_N)
    problem = replace(problem, tokens=replace(problem.tokens, sampler_logprobs_N=fresh_N))
    stats = losses_of("sampled", problem, **options).stats
    torch.testing.assert_close(stats["ratio"], problem.tokens.mask_N.double(), rtol=0, atol=1e-12)
    assert stats["ratio_clipped"].sum() == 0


def test_over_a_stale_sampler_the_expected_gradient_is_that_of_the_kl_of_classes() -> None:
    """Every id that could follow one prefix, weighted by its probability under the sampler."""
    problem, row = random_problem(), 3
    log_old_V = random_problem(seed=1).log_p().detach()[row]
    tokens = Tokens(
        ids_N=torch.arange(VOCAB),
        offsets=torch.arange(VOCAB + 1),
        mask_N=torch.ones(VOCAB, dtype=torch.bool),
        weights_N=log_old_V.exp(),
        sampler_logprobs_N=log_old_V,
        advantages_N=torch.zeros(VOCAB),
    )
    every = replace(
        problem,
        hidden_ND=problem.hidden_ND[row].expand(VOCAB, -1),
        teacher_hidden_ND=problem.teacher_hidden_ND[row].expand(VOCAB, -1),
        tokens=tokens,
    )
    signal = SampledSignal(logprobs_N=at_outcome(every, merged(every.log_q())))
    policy = PolicyOptions(ratio="truncated", ratio_cap=1e6)
    loss = losses_of("sampled", every, signal=signal, policy=policy, equivalent_ids=CLASSES).loss
    kl = kl_terms(merged(problem.log_p()).exp(), merged(problem.log_q()).exp()).sum(-1)[row]
    torch.testing.assert_close(loss, kl, rtol=0, atol=1e-12)
    for actual, expected in zip(gradients(loss, problem), gradients(kl, problem), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_diagnosed_mass_of_a_support_includes_whole_classes() -> None:
    problem = class_problem()
    columns_NK = random_columns(5)
    losses = losses_of(
        "support",
        problem,
        signal=support_signal(problem, columns_NK),
        equivalent_ids=CLASSES,
        diagnostic_tokens=11,
    )
    mass_N = merged(problem.log_p().detach()).exp().gather(1, columns_NK).sum(-1) * problem.tokens.mask_N
    torch.testing.assert_close(losses.diagnostics["support_student_mass"], mass_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [[[1, 2], [2, 3]], [[4]], [[5, 5]]])
def test_classes_that_overlap_or_have_one_member_are_refused_by_their_key(classes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"objective\.equivalent_tokens has ids .*: expected disjoint classes of 2\+"):
        Equivalence.of(classes, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["sampled", "support", "full"])
def test_an_id_that_not_both_models_have_is_refused_by_its_key(name: str) -> None:
    problem = random_problem()  # 12 common ids; the student has 13 rows, the teacher 15
    with pytest.raises(ValueError, match=r"objective\.equivalent_tokens has the id 12: expected ids below 12"):
        losses_of(name, problem, equivalent_ids=((1, 12),))
