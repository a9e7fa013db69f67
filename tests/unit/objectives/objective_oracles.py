"""Random micro-batches and naive reference formulas for the tests of the objectives.

Suffixes: N flat tokens, V vocabulary, K support, D hidden.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_ray.objectives import (
    OBJECTIVES,
    Divergence,
    HiddenSignal,
    Losses,
    ObjectiveOptions,
    Payload,
    PolicyOptions,
    SampledSignal,
    Signal,
    SupportSignal,
    Tail,
    Tokens,
    forward_kl,
    generalised_jsd,
    mixed_kl,
    reverse_kl,
    skewed_reverse_kl,
)

Terms = Callable[[Tensor, Tensor], Tensor]
"""Probabilities p and q -> the divergence's terms, elementwise and differentiable in p"""


def kl_terms(a: Tensor, b: Tensor) -> Tensor:
    return a * (a / b).log()


def jsd_terms(beta: float) -> Terms:
    def terms(p: Tensor, q: Tensor) -> Tensor:
        m = (1 - beta) * p + beta * q
        return beta * kl_terms(q, m) + (1 - beta) * kl_terms(p, m)

    return terms


@dataclass(frozen=True, kw_only=True)
class Case:
    """A divergence and the formula that it stands for."""

    divergence: Divergence
    terms: Terms


CASES = {
    "reverse": Case(divergence=reverse_kl(), terms=kl_terms),
    "forward": Case(divergence=forward_kl(), terms=lambda p, q: kl_terms(q, p)),
    "jsd 0": Case(divergence=generalised_jsd(0.0), terms=lambda p, q: kl_terms(q, p)),
    "jsd 0.1": Case(divergence=generalised_jsd(0.1), terms=jsd_terms(0.1)),
    "jsd 0.5": Case(divergence=generalised_jsd(0.5), terms=jsd_terms(0.5)),
    "jsd 0.9": Case(divergence=generalised_jsd(0.9), terms=jsd_terms(0.9)),
    "jsd 1": Case(divergence=generalised_jsd(1.0), terms=kl_terms),
    "skewed 0": Case(divergence=skewed_reverse_kl(0.0), terms=kl_terms),
    "skewed 0.1": Case(divergence=skewed_reverse_kl(0.1), terms=lambda p, q: kl_terms(p, 0.9 * q + 0.1 * p)),
    "skewed 0.7": Case(divergence=skewed_reverse_kl(0.7), terms=lambda p, q: kl_terms(p, 0.3 * q + 0.7 * p)),
    "mixed 0.3": Case(divergence=mixed_kl(0.3), terms=lambda p, q: 0.3 * kl_terms(q, p) + 0.7 * kl_terms(p, q)),
}
TAILS: tuple[Tail, ...] = ("renormalise", "bucket", "sampled_corrected", "sampled_uncorrected", "none")

# Each a way to call an objective: what holds for every objective is tested on all of them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sampled": ("sampled", {"policy": PolicyOptions(discount=0.9, reward_clip=1.0)}),
    "sampled kl baseline": ("sampled", {"policy": PolicyOptions(discount=1.0, kl_baseline=True)}),
    "sampled ppo nucleus": ("sampled", {"policy": PolicyOptions(discount=0.9, ratio="ppo", top_p=0.9)}),
    **{f"support {tail}": ("support", {"tail": tail}) for tail in TAILS},
    "support classes": ("support", {"equivalent_ids": ((3, 1), (7, 0, 9))}),
    "support bucket classes": ("support", {"equivalent_ids": ((3, 1), (7, 0, 9)), "tail": "bucket"}),
    "full": ("full", {}),
    "full jsd": ("full", {"divergence": generalised_jsd(0.3)}),
    "full classes": ("full", {"equivalent_ids": ((3, 1), (7, 0, 9))}),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A micro-batch with a student and a teacher of different sizes."""

    hidden_ND: Tensor
    head_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_head_VD: Tensor
    tokens: Tokens
    vocab_size: int  # common range

    def log_p(self, temperature: float = 1.0) -> Tensor:
        """The student's log-probs over the common range [N,V] in float64, differentiable."""
        logits_NV = self.hidden_ND.double() @ self.head_VD.double()[: self.vocab_size].T
        return (logits_NV / temperature).log_softmax(-1)

    def log_q(self, temperature: float = 1.0) -> Tensor:
        logits_NV = self.teacher_hidden_ND.double() @ self.teacher_head_VD.double()[: self.vocab_size].T
        return (logits_NV / temperature).log_softmax(-1)

    def sampled(self, log_NV: Tensor) -> Tensor:
        """Its value at the sampled tokens."""
        ids_N = self.tokens.ids_N.masked_fill(~self.tokens.mask_N, 0)
        return log_NV.gather(-1, ids_N[:, None]).squeeze(-1)

    def signal(self, payload: Payload, *, top_k: int = 4, temperature: float = 1.0) -> Signal:
        """What the teacher would send."""
        dtype = torch.promote_types(self.hidden_ND.dtype, torch.float32)
        log_q_NV = self.log_q(temperature)
        if payload == "hidden":
            return HiddenSignal(hidden_ND=self.teacher_hidden_ND, head_VD=self.teacher_head_VD)
        log_q_N = self.sampled(log_q_NV).to(dtype)
        if payload == "sampled":
            return SampledSignal(logprobs_N=log_q_N)
        top = log_q_NV.topk(top_k, dim=-1)
        return SupportSignal(ids_NK=top.indices, logprobs_NK=top.values.to(dtype), sampled_logprobs_N=log_q_N)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_ND, self.head_VD


def random_problem(
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    masked: Sequence[int] = (),
    lengths: Sequence[int] = (4, 1, 6),
) -> Problem:
    """Heads of 13 (student) and 15 (teacher) rows over 12 common ids; unequal weights, so that no token can stand in
    for another."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_tokens, vocab_size = sum(lengths), 12
    mask_N = torch.ones(num_tokens, dtype=torch.bool)
    mask_N[list(masked)] = False
    return Problem(
        hidden_ND=random(num_tokens, 5).requires_grad_(),
        head_VD=random(13, 5).requires_grad_(),
        teacher_hidden_ND=random(num_tokens, 7),
        teacher_head_VD=random(15, 7),
        tokens=Tokens(
            ids_N=torch.randint(vocab_size, (num_tokens,), generator=generator),
            offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
            mask_N=mask_N,
            weights_N=0.5 + random(num_tokens).float().sigmoid(),
            sampler_logprobs_N=-2 - random(num_tokens).float().sigmoid(),
            advantages_N=random(num_tokens).float(),
        ),
        vocab_size=vocab_size,
    )


def part_of(problem: Problem, first: int, last: int) -> Problem:
    """The micro-batch of the sequences first to last - 1, with the same leaves."""
    tokens = problem.tokens
    rows = slice(int(tokens.offsets[first]), int(tokens.offsets[last]))
    return replace(
        problem,
        hidden_ND=problem.hidden_ND[rows],
        teacher_hidden_ND=problem.teacher_hidden_ND[rows],
        tokens=Tokens(
            ids_N=tokens.ids_N[rows],
            offsets=tokens.offsets[first : last + 1] - rows.start,
            mask_N=tokens.mask_N[rows],
            weights_N=tokens.weights_N[rows],
            sampler_logprobs_N=tokens.sampler_logprobs_N[rows],
            advantages_N=tokens.advantages_N[rows],
        ),
    )


def losses_of(name: str, problem: Problem, *, signal: Signal | None = None, **options: Any) -> Losses:
    """The losses of the objective, with the signal that its options ask for unless one is given."""
    full_options = ObjectiveOptions(**{"vocab_size": problem.vocab_size, **options})
    if signal is None:
        payload = OBJECTIVES[name].payload(full_options)
        signal = problem.signal(payload, temperature=full_options.temperature)
    return OBJECTIVES[name].losses(
        problem.hidden_ND, problem.head_VD, tokens=problem.tokens, signal=signal, options=full_options
    )


def gradients(loss: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, problem.leaves())


def naive_returns(costs_N: Tensor, *, offsets: Tensor, discount: float) -> Tensor:
    """The double sum over t and t' >= t, literally."""
    returns_N = torch.zeros_like(costs_N)
    for start, end in itertools.pairwise(offsets.tolist()):
        for t in range(start, end):
            for later in range(t, end):
                returns_N[t] += discount ** (later - t) * costs_N[later]
    return returns_N


def naive_sampled(problem: Problem, *, temperature: float = 1.0, policy: PolicyOptions | None = None) -> Tensor:
    """C_t, held constant, times p / sg(p): the loss of `sampled` at ratio 1."""
    policy, tokens = policy or PolicyOptions(), problem.tokens
    log_p_N, log_q_N = problem.sampled(problem.log_p(temperature)), problem.sampled(problem.log_q(temperature))
    clip = policy.reward_clip or torch.inf
    costs_N = (log_p_N.detach() - log_q_N).clamp(-clip, clip).where(tokens.mask_N, 0)
    returns_N = naive_returns(costs_N, offsets=tokens.offsets, discount=policy.discount)
    return (returns_N - tokens.advantages_N) * (log_p_N - log_p_N.detach()).exp() * tokens.mask_N


def naive_support(problem: Problem, signal: SupportSignal, *, tail: Tail, terms: Terms) -> Tensor:
    """The loss of `support` with the whole [N,V] in memory; every id of the signal is in the vocabulary."""
    p_NV, q_NK = problem.log_p().exp(), signal.logprobs_NK.double().exp()
    p_NK = p_NV.gather(-1, signal.ids_NK)
    p_tail_N1, q_tail_N1 = 1 - p_NK.sum(-1, keepdim=True), 1 - q_NK.sum(-1, keepdim=True)
    if tail == "renormalise":
        loss_N = terms(p_NK / (1 - p_tail_N1), q_NK / (1 - q_tail_N1)).sum(-1)
    elif tail == "bucket":
        loss_N = terms(torch.cat([p_NK, p_tail_N1], -1), torch.cat([q_NK, q_tail_N1], -1)).sum(-1)
    else:
        p_N, q_N = problem.sampled(p_NV), signal.sampled_logprobs_N.double().exp()
        outside_N = (signal.ids_NK != problem.tokens.ids_N[:, None]).all(-1)
        phi_N = terms(p_N, q_N)
        seen_N = {
            "none": torch.zeros_like(p_N),
            "sampled_corrected": phi_N / p_N.detach(),
            "sampled_uncorrected": (phi_N / p_N).detach() * p_N / p_N.detach(),
        }[tail]
        loss_N = terms(p_NK, q_NK).sum(-1) + seen_N * outside_N
    return loss_N * problem.tokens.mask_N


def naive_full(problem: Problem, *, terms: Terms = kl_terms, temperature: float = 1.0) -> Tensor:
    loss_N = terms(problem.log_p(temperature).exp(), problem.log_q(temperature).exp()).sum(-1)
    return loss_N * problem.tokens.mask_N


def assert_agrees(losses: Losses, naive_N: Tensor, problem: Problem, *, tolerance: float) -> None:
    """Compare the loss per token, the weighted loss and the gradients in states and head with a naive formula."""
    expected = (problem.tokens.weights_N.double().where(problem.tokens.mask_N, 0) * naive_N).sum()
    assert_close({"loss_N": losses.loss_N, "loss": losses.loss}, {"loss_N": naive_N, "loss": expected}, tolerance)
    names = "hidden", "head"
    actual = dict(zip(names, gradients(losses.loss, problem), strict=True))
    assert_close(actual, dict(zip(names, gradients(expected, problem), strict=True)), tolerance)


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare tensors of any dtypes by name; the tolerance is relative to the largest entry, and at least 1."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        scale = max(1.0, expected[name].detach().abs().max().item()) if expected[name].numel() else 1.0
        torch.testing.assert_close(
            tensor.double(),
            expected[name].double(),
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_is_slope(
    given: Sequence[Tensor], value: Callable[..., Tensor], at: Sequence[Tensor], *, tolerance: float = 1e-8
) -> None:
    """Compare gradients with central differences of the value along random directions of all arguments."""
    generator, step = torch.Generator().manual_seed(7), 1e-5
    for _ in range(5):
        directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in at]
        directions = [direction / direction.norm() for direction in directions]
        ahead, behind = (
            value(*(x.detach() + sign * step * d for x, d in zip(at, directions, strict=True))) for sign in (1, -1)
        )
        expected = sum((gradient * d).sum() for gradient, d in zip(given, directions, strict=True))
        assert abs(float((ahead - behind) / (2 * step) - expected)) < tolerance
