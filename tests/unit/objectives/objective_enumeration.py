"""Every sequence of a small tabular student, so that expectations are sums.

Suffixes: S sequences enumerated, T tokens of a sequence, C contexts (prefixes), N flat tokens, V vocabulary, D hidden.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_ray.objectives import (
    OBJECTIVES,
    HiddenSignal,
    Losses,
    ObjectiveOptions,
    SampledSignal,
    Signal,
    SupportSignal,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class Enumeration:
    """One hidden state per prefix, so that the gradient sees all of them."""

    table_CD: Tensor  # student's state at each prefix, requires grad
    head_VD: Tensor  # student's head, requires grad
    log_q_CV: Tensor  # teacher
    contexts_ST: Tensor  # prefix of each token
    ids_ST: Tensor  # each token

    @property
    def tokens(self) -> Tokens:
        """All sequences as one micro-batch, each weighted by its probability: a loss is an expectation."""
        num_sequences, length = self.ids_ST.shape
        zeros_N = torch.zeros(num_sequences * length, dtype=torch.float64)
        return Tokens(
            ids_N=self.ids_ST.flatten(),
            offsets=torch.arange(num_sequences + 1) * length,
            mask_N=torch.ones(num_sequences * length, dtype=torch.bool),
            weights_N=self.probability_S()[:, None].expand(-1, length).flatten(),
            sampler_logprobs_N=self.log_p_ST().detach().flatten(),
            advantages_N=zeros_N,
        )

    @property
    def hidden_ND(self) -> Tensor:
        return self.table_CD[self.contexts_ST.flatten()]

    @property
    def signal(self) -> SampledSignal:
        return SampledSignal(logprobs_N=self.log_q_ST.flatten())

    @property
    def hidden_signal(self) -> HiddenSignal:
        """The same teacher, with its log-probs as states."""
        eye = torch.eye(self.log_q_CV.shape[1], dtype=torch.float64)
        return HiddenSignal(hidden_ND=self.log_q_CV[self.contexts_ST.flatten()], head_VD=eye)

    def support_signal(self, top_k: int) -> SupportSignal:
        top = self.log_q_CV[self.contexts_ST.flatten()].topk(top_k, dim=-1)
        return SupportSignal(ids_NK=top.indices, logprobs_NK=top.values, sampled_logprobs_N=self.log_q_ST.flatten())

    @property
    def log_q_ST(self) -> Tensor:
        return self.log_q_CV[self.contexts_ST, self.ids_ST]

    def log_p_CV(self) -> Tensor:
        return (self.table_CD @ self.head_VD.T).log_softmax(-1)

    def log_p_ST(self) -> Tensor:
        return self.log_p_CV()[self.contexts_ST, self.ids_ST]

    def probability_S(self) -> Tensor:
        return self.log_p_ST().sum(-1).exp().detach()

    def sequence_kl(self) -> Tensor:
        """J = sum_y p(y) (log p(y) - log q(y)), differentiable."""
        log_p_S = self.log_p_ST().sum(-1)
        return (log_p_S.exp() * (log_p_S - self.log_q_ST.sum(-1))).sum()

    def expected(self, values_CV: Tensor) -> Tensor:
        """Sum over prefixes of (constant probability to reach it) * sum_v values there, differentiable."""
        return (self.probability_S() * values_CV.sum(-1)[self.contexts_ST].sum(-1)).sum()

    def prefix_kl(self) -> Tensor:
        """The KL of each token, with the prefixes held fixed."""
        log_p_CV = self.log_p_CV()
        return self.expected(log_p_CV.exp() * (log_p_CV - self.log_q_CV))

    def losses(
        self, name: str, *, tokens: Tokens | None = None, signal: Signal | None = None, **options: Any
    ) -> Losses:
        """The losses of the objective on all sequences."""
        return OBJECTIVES[name].losses(
            self.hidden_ND,
            self.head_VD,
            tokens=tokens or self.tokens,
            signal=signal or self.signal,
            options=ObjectiveOptions(**options),
        )

    def with_costs(self, costs_ST: Tensor) -> Tokens:
        """Tokens whose cost C_t in `sampled` at discount 0 is the given one."""
        own_ST = (self.log_p_ST() - self.log_q_ST).detach()
        return replace(self.tokens, advantages_N=(own_ST - costs_ST).flatten())

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient in table and head as one vector."""
        gradients = torch.autograd.grad(value, (self.table_CD, self.head_VD))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def variance(self, tokens: Tokens, **options: Any) -> Tensor:
        """The total variance of the gradient of one sampled sequence."""
        length = self.ids_ST.shape[1]
        sequence_N = torch.arange(len(self.ids_ST)).repeat_interleave(length)
        gradients_SX = torch.stack(
            [
                self.gradient(
                    self.losses("sampled", tokens=replace(tokens, weights_N=(sequence_N == s).double()), **options).loss
                )
                for s in range(len(self.ids_ST))
            ]
        )
        deviations_SX = gradients_SX - self.probability_S() @ gradients_SX
        return self.probability_S() @ deviations_SX.square().sum(-1)


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
