"""Small exact problems and naive reference formulas for the tests of the objectives.

Suffixes: S sequences enumerated, T tokens of a sequence, C contexts (prefixes), N flat tokens, V vocabulary, D hidden.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives import (
    OBJECTIVES,
    HiddenSignal,
    ObjectiveOptions,
    SampledSignal,
    SupportSignal,
    TokenLosses,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class Enumeration:
    """Every sequence of a tabular student: one hidden state per prefix, so that the gradient sees all of them."""

    table_CD: Tensor  # student's state at each prefix, requires grad
    head_VD: Tensor  # student's head, requires grad
    log_q_CV: Tensor  # teacher
    contexts_ST: Tensor  # prefix of each token
    ids_ST: Tensor  # each token

    @property
    def tokens(self) -> Tokens:
        num_sequences, length = self.ids_ST.shape
        return Tokens(
            ids_N=self.ids_ST.flatten(),
            offsets=torch.arange(num_sequences + 1) * length,
            mask_N=torch.ones(num_sequences * length, dtype=torch.bool),
        )

    @property
    def hidden_ND(self) -> Tensor:
        return self.table_CD[self.contexts_ST.flatten()]

    @property
    def signal(self) -> SampledSignal:
        return SampledSignal(logprobs_N=self.log_q_ST.flatten())

    @property
    def log_q_ST(self) -> Tensor:
        return self.log_q_CV[self.contexts_ST, self.ids_ST]

    def log_p_CV(self) -> Tensor:
        return (self.table_CD @ self.head_VD.T).log_softmax(-1)

    def log_p_ST(self) -> Tensor:
        return self.log_p_CV()[self.contexts_ST, self.ids_ST]

    def sequence_kl(self) -> Tensor:
        """J = sum_y p(y) (log p(y) - log q(y)), differentiable."""
        log_p_S = self.log_p_ST().sum(-1)
        return (log_p_S.exp() * (log_p_S - self.log_q_ST.sum(-1))).sum()

    def prefix_kl(self) -> Tensor:
        """sum over prefixes of (constant probability to reach it) * KL(p || q) there, differentiable."""
        log_p_CV = self.log_p_CV()
        kl_C = (log_p_CV.exp() * (log_p_CV - self.log_q_CV)).sum(-1)
        probability_S = self.log_p_ST().sum(-1).exp().detach()
        return (probability_S * kl_C[self.contexts_ST].sum(-1)).sum()

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient in table and head as one vector."""
        gradients = torch.autograd.grad(value, (self.table_CD, self.head_VD), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


def enumerate_sequences(*, vocab_size: int, length: int, seed: int = 0) -> Enumeration:
    """All vocab_size^length sequences, with random student and teacher in float64."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for t in range(length) for prefix in itertools.product(range(vocab_size), repeat=t)]
    index = {prefix: row for row, prefix in enumerate(prefixes)}
    sequences = list(itertools.product(range(vocab_size), repeat=length))
    dim = vocab_size + 1

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Enumeration(
        table_CD=random(len(prefixes), dim).requires_grad_(),
        head_VD=random(vocab_size, dim).requires_grad_(),
        log_q_CV=random(len(prefixes), vocab_size).log_softmax(-1),
        contexts_ST=torch.tensor([[index[sequence[:t]] for t in range(length)] for sequence in sequences]),
        ids_ST=torch.tensor(sequences),
    )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A random micro-batch of three sequences, with a student and a teacher of different sizes."""

    hidden_ND: Tensor
    head_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_head_VD: Tensor
    tokens: Tokens
    vocab_size: int  # common range

    def teacher_log_q(self, temperature: float = 1.0) -> Tensor:
        logits_NV = self.teacher_hidden_ND.double() @ self.teacher_head_VD.double().T
        return (logits_NV[:, : self.vocab_size] / temperature).log_softmax(-1)

    def signal(self, name: str, *, top_k: int = 4) -> SampledSignal | SupportSignal | HiddenSignal:
        """What the teacher would send for the objective of that name."""
        log_q_NV = self.teacher_log_q()
        if name == "sampled":
            return SampledSignal(logprobs_N=log_q_NV.gather(-1, self.tokens.ids_N[:, None]).squeeze(-1).float())
        if name == "support":
            top = log_q_NV.topk(top_k, dim=-1)
            return SupportSignal(ids_NK=top.indices, logprobs_NK=top.values.float())
        return HiddenSignal(hidden_ND=self.teacher_hidden_ND, head_VD=self.teacher_head_VD)


def random_problem(*, dtype: torch.dtype = torch.float32, seed: int = 0, masked: tuple[int, ...] = ()) -> Problem:
    """11 tokens in 3 sequences; heads of 13 (student) and 15 (teacher) rows over 12 common ids."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_tokens, vocab_size = 11, 12
    mask_N = torch.ones(num_tokens, dtype=torch.bool)
    mask_N[list(masked)] = False
    return Problem(
        hidden_ND=random(num_tokens, 5).requires_grad_(),
        head_VD=random(13, 5).requires_grad_(),
        teacher_hidden_ND=random(num_tokens, 7),
        teacher_head_VD=random(15, 7),
        tokens=Tokens(
            ids_N=torch.randint(vocab_size, (num_tokens,), generator=generator),
            offsets=torch.tensor([0, 4, 5, 11]),
            mask_N=mask_N,
        ),
        vocab_size=vocab_size,
    )


def naive_returns(costs_N: Tensor, *, offsets: Tensor, discount: float) -> Tensor:
    """The double sum over t and t' >= t, literally."""
    returns_N = torch.zeros_like(costs_N)
    for start, end in itertools.pairwise(offsets.tolist()):
        for t in range(start, end):
            for later in range(t, end):
                returns_N[t] += discount ** (later - t) * costs_N[later]
    return returns_N


def naive_losses(name: str, problem: Problem, *, temperature: float, discount: float, top_k: int = 4) -> Tensor:
    """The loss of each token with the whole [N,V] in memory, by autograd through the plain formula, in float64."""
    tokens, vocab_size = problem.tokens, problem.vocab_size
    logits_NV = problem.hidden_ND.double() @ problem.head_VD.double()[:vocab_size].T / temperature
    log_p_NV = logits_NV.log_softmax(-1)
    log_q_NV = problem.teacher_log_q(temperature)
    if name == "sampled":
        # as `Problem.signal` hands it out: the temperature of the teacher's log-probs is the sender's business
        log_q_N = problem.teacher_log_q().gather(-1, tokens.ids_N[:, None]).squeeze(-1)
        log_p_N = log_p_NV.gather(-1, tokens.ids_N[:, None]).squeeze(-1)
        costs_N = (log_p_N.detach() - log_q_N) * tokens.mask_N
        loss_N = naive_returns(costs_N, offsets=tokens.offsets, discount=discount) * log_p_N
    elif name == "support":
        top = problem.teacher_log_q().topk(top_k, dim=-1)
        log_p_NK = logits_NV.gather(-1, top.indices).log_softmax(-1)
        loss_N = (log_p_NK.exp() * (log_p_NK - top.values.log_softmax(-1))).sum(-1)
    else:
        loss_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    return loss_N * tokens.mask_N


def losses_of(name: str, problem: Problem, **options: float) -> TokenLosses:
    """The losses of the objective of that name, over the problem's common vocabulary."""
    return OBJECTIVES[name].token_losses(
        problem.hidden_ND,
        problem.head_VD,
        tokens=problem.tokens,
        signal=problem.signal(name),
        options=ObjectiveOptions(vocab_size=problem.vocab_size, **options),
    )


def weighted_gradients(loss_N: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """Gradients in states and head of a sum with unequal weights, so that no token can stand in for another."""
    weights_N = torch.linspace(0.5, 2.0, len(loss_N), dtype=loss_N.dtype)
    return torch.autograd.grad((weights_N * loss_N).sum(), (problem.hidden_ND, problem.head_VD))
