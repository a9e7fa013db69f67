"""Bias and variance of the `sampled` objective's gradient on tabular students, exact where sequences are enumerated.

A tabular student has one logit vector per context. Three problems, in all of which the expected cost of a token stays
the same however long the sequence is, so that growth in T is the estimator's:
- `tree`: a context per prefix, student and teacher drawn at random for each: what a token costs depends on all before;
- `positions`: a context per position, one costly teacher for all: costs are independent and of positive mean;
- `branches`: the first token decides whether the rest costs anything, and the positions of a branch share their logits.
  That choice makes the tokens' gradients add up, which the worst case of the token-level estimator needs.

Why no problem reaches T^4: with |r_t| <= R and |g_t| <= G, the estimator is sum_t' r_t' M_t' with M_t' the sum of the
scores up to t', a martingale on policy, so E|M_t'|^2 <= t' G^2. Then E|sum_t' r_t' M_t'|^2 <= T sum_t' R^2 E|M_t'|^2
<= R^2 G^2 T^2 (T + 1) / 2. So the T^4 of arXiv 2603.25562 is a bound but not the order, which is T^3: `positions` and
`branches` reach it. With a discount below 1 the bound is (R G T / (1 - discount))^2, and `branches` reaches its order.

Suffixes: S sequences, T tokens of a sequence, N = S * T flat tokens, C contexts, V vocabulary. Log-probs in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions, SampledSignal, Tokens

LOGIT_RANGE = 1.5  # random logits are uniform in +-this, which bounds every log-ratio by 4 times as much
COSTLY_LOGITS = (0.0, 1.0, -1.0)  # of the teacher where a uniform student pays, in `positions` and `branches`
_CHUNK_TOKENS = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """A gradient estimator: tokens are charged discounted later costs, or every cost of the sequence."""

    name: str
    discount: float
    past_costs: bool = False  # with discount 1: the full sequence-level estimator


@dataclass(frozen=True, slots=True, kw_only=True)
class TabularProblem:
    """A student, its teacher, and the context that follows each token."""

    logits_CV: Tensor  # float64, the student's parameters
    log_q_CV: Tensor  # float64
    next_CV: Tensor  # int64
    length: int  # T


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """The distribution of an estimator's gradient in the logits."""

    mean_CV: Tensor
    variance: float  # trace of the covariance, nats^2


def tree_problem(*, vocab_size: int, length: int, seed: int) -> TabularProblem:
    """Return random logits for every prefix; a longer problem of the same seed extends the shorter one."""
    num_contexts = sum(vocab_size**t for t in range(length))

    def random_CV(stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(2 * seed + stream)
        uniform = torch.rand(num_contexts, vocab_size, generator=generator, dtype=torch.float64)
        return (2 * uniform - 1) * LOGIT_RANGE

    children_CV = torch.arange(num_contexts * vocab_size).view(num_contexts, vocab_size) + 1
    return TabularProblem(
        logits_CV=random_CV(0),
        log_q_CV=random_CV(1).log_softmax(-1),
        next_CV=children_CV.where(children_CV < num_contexts, 0),  # after the last token no context matters
        length=length,
    )


def positions_problem(length: int) -> TabularProblem:
    """Return a uniform student with logits per position and the costly teacher at each."""
    logits_CV = torch.zeros(length, len(COSTLY_LOGITS), dtype=torch.float64)
    following_C = torch.arange(1, length + 1).clamp(max=length - 1)
    return TabularProblem(
        logits_CV=logits_CV,
        log_q_CV=torch.tensor(COSTLY_LOGITS, dtype=torch.float64).log_softmax(-1).expand_as(logits_CV),
        next_CV=following_C[:, None].expand_as(logits_CV),
        length=length,
    )


def branches_problem(length: int) -> TabularProblem:
    """Return a uniform student with three contexts: the start, a branch like the teacher's and the costly one."""
    logits_CV = torch.zeros(3, len(COSTLY_LOGITS), dtype=torch.float64)
    teacher_CV = logits_CV.clone()
    teacher_CV[2] = torch.tensor(COSTLY_LOGITS, dtype=torch.float64)
    next_CV = torch.tensor([[1, 2, 2], [1, 1, 1], [2, 2, 2]])
    return TabularProblem(logits_CV=logits_CV, log_q_CV=teacher_CV.log_softmax(-1), next_CV=next_CV, length=length)


def contexts_of(problem: TabularProblem, ids_ST: Tensor) -> Tensor:
    """Return the context [S,T] in which each token is drawn."""
    contexts = [torch.zeros_like(ids_ST[:, 0])]
    for ids_S in ids_ST.T[:-1]:
        contexts.append(problem.next_CV[contexts[-1], ids_S])
    return torch.stack(contexts, dim=1)


def enumerate_sequences(problem: TabularProblem) -> Tensor:
    """Return all V^T sequences [S,T]."""
    num_tokens = problem.logits_CV.shape[1]
    return torch.cartesian_prod(*[torch.arange(num_tokens)] * problem.length).view(-1, problem.length)


def sample_sequences(problem: TabularProblem, *, num_sequences: int, seed: int) -> Tensor:
    """Return sequences [S,T] drawn from the student."""
    generator = torch.Generator().manual_seed(seed)
    probabilities_CV = problem.logits_CV.softmax(-1)
    contexts_S, ids = torch.zeros(num_sequences, dtype=torch.int64), []
    for _ in range(problem.length):
        ids.append(torch.multinomial(probabilities_CV[contexts_S], 1, generator=generator).squeeze(1))
        contexts_S = problem.next_CV[contexts_S, ids[-1]]
    return torch.stack(ids, dim=1)


def sequence_logprobs(log_CV: Tensor, *, contexts_ST: Tensor, ids_ST: Tensor) -> Tensor:
    """Return the log-prob [S] of each sequence."""
    return log_CV[contexts_ST, ids_ST].sum(-1)


def objective_gradient(problem: TabularProblem) -> Tensor:
    """Return the exact gradient [C,V] of J = sum_y p(y) (log p(y) - log q(y))."""
    ids_ST = enumerate_sequences(problem)
    contexts_ST = contexts_of(problem, ids_ST)
    logits_CV = problem.logits_CV.clone().requires_grad_()
    log_p_S = sequence_logprobs(logits_CV.log_softmax(-1), contexts_ST=contexts_ST, ids_ST=ids_ST)
    log_q_S = sequence_logprobs(problem.log_q_CV, contexts_ST=contexts_ST, ids_ST=ids_ST)
    (gradient_CV,) = torch.autograd.grad((log_p_S.exp() * (log_p_S - log_q_S)).sum(), logits_CV)
    return gradient_CV


def sequence_gradients(problem: TabularProblem, ids_ST: Tensor, *, estimator: Estimator) -> Tensor:
    """Return each sequence's gradient estimate [S,C,V] by the `sampled` objective.

    The head is the identity and the states are the logits, so the gradient in the states holds each token's own part.
    """
    (num_sequences, length), (num_contexts, vocab_size) = ids_ST.shape, problem.logits_CV.shape
    contexts_ST = contexts_of(problem, ids_ST)
    log_p_ST = problem.logits_CV.log_softmax(-1)[contexts_ST, ids_ST]
    log_q_ST = problem.log_q_CV[contexts_ST, ids_ST]
    costs_ST = log_p_ST - log_q_ST
    past_ST = costs_ST.cumsum(1) - costs_ST if estimator.past_costs else torch.zeros_like(costs_ST)
    hidden_NV = problem.logits_CV[contexts_ST.flatten()].requires_grad_()
    losses = OBJECTIVES["sampled"].losses(
        hidden_NV,
        torch.eye(vocab_size, dtype=hidden_NV.dtype),
        tokens=Tokens(
            ids_N=ids_ST.flatten(),
            offsets=torch.arange(num_sequences + 1) * length,
            mask_N=torch.ones(ids_ST.numel(), dtype=torch.bool),
            weights_N=torch.ones(ids_ST.numel(), dtype=hidden_NV.dtype),
            sampler_logprobs_N=log_p_ST.flatten(),
            advantages_N=-past_ST.flatten(),
        ),
        signal=SampledSignal(logprobs_N=log_q_ST.flatten()),
        options=ObjectiveOptions(policy=PolicyOptions(discount=estimator.discount), chunk_tokens=_CHUNK_TOKENS),
    )
    (tokens_NV,) = torch.autograd.grad(losses.loss, hidden_NV)
    cells_ST = torch.arange(num_sequences)[:, None] * num_contexts + contexts_ST
    gradients = torch.zeros(num_sequences * num_contexts, vocab_size, dtype=tokens_NV.dtype)
    return gradients.index_add_(0, cells_ST.flatten(), tokens_NV).view(num_sequences, num_contexts, vocab_size)


def moments(gradients_SCV: Tensor, *, probabilities_S: Tensor) -> Moments:
    """Return mean and total variance of gradients that have these probabilities."""
    mean_CV = torch.einsum("s,scv->cv", probabilities_S, gradients_SCV)
    squares_S = (gradients_SCV - mean_CV).square().sum((1, 2))
    return Moments(mean_CV=mean_CV, variance=float(probabilities_S @ squares_S))


def exact_moments(problem: TabularProblem, *, estimator: Estimator) -> Moments:
    """Return the moments over all V^T sequences."""
    ids_ST = enumerate_sequences(problem)
    log_p_CV = problem.logits_CV.log_softmax(-1)
    log_p_S = sequence_logprobs(log_p_CV, contexts_ST=contexts_of(problem, ids_ST), ids_ST=ids_ST)
    return moments(sequence_gradients(problem, ids_ST, estimator=estimator), probabilities_S=log_p_S.exp())


def relative_bias(mean_CV: Tensor, *, gradient_CV: Tensor) -> float:
    """Return |E[g] - grad J| / |grad J|."""
    return float((mean_CV - gradient_CV).norm() / gradient_CV.norm())


def growth_exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(value) against log(T)."""
    x = [math.log(length) for length in lengths]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
