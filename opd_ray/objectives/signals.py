"""What an objective is told about the tokens of a micro-batch: the tokens themselves, and one teacher's signal.

Suffixes: N flat tokens, B sequences, K support, V vocabulary rows of a head, D hidden size. Index t of a per-token
tensor speaks of token t itself. Log-probs are in nats and at the rollout temperature.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The sampled tokens of B whole sequences, laid end to end."""

    ids_N: Tensor  # [N] int64, sampled token; any value where mask_N is false
    offsets: Tensor  # [B+1] int64, sequence b is ids_N[offsets[b]:offsets[b+1]]; first 0, last N
    mask_N: Tensor  # [N] bool, true: the token counts; false: it enters no loss, no return and no metric
    weights_N: Tensor  # [N] floating, of each token's loss in the micro-batch's sum; read where mask_N is true
    sampler_logprobs_N: Tensor  # [N] floating, log-prob of the token under the policy that sampled it
    advantages_N: Tensor  # [N] floating, added to the advantage of `sampled`: minus a baseline, plus a task reward

    def __post_init__(self) -> None:
        for name in ("mask_N", "weights_N", "sampler_logprobs_N", "advantages_N"):
            if getattr(self, name).shape != self.ids_N.shape or self.ids_N.dim() != 1:
                shapes = f"ids_N {tuple(self.ids_N.shape)}, {name} {tuple(getattr(self, name).shape)}"
                raise ValueError(f"Tokens: {shapes}, expected [N] twice")
        if self.mask_N.dtype != torch.bool:
            raise ValueError(f"Tokens.mask_N has dtype {self.mask_N.dtype}, expected torch.bool")

    def cleared(self) -> "Tokens":
        """Return the same tokens with 0 for everything that a masked token holds."""
        masked_N = ~self.mask_N
        return replace(
            self,
            ids_N=self.ids_N.masked_fill(masked_N, 0),
            weights_N=self.weights_N.masked_fill(masked_N, 0),
            sampler_logprobs_N=self.sampler_logprobs_N.masked_fill(masked_N, 0),
            advantages_N=self.advantages_N.masked_fill(masked_N, 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSignal:
    """The teacher's log-prob of each sampled token."""

    logprobs_N: Tensor  # [N] floating, log q(y_t) over the full common vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSignal:
    """The teacher's log-probs on a small set S of ids per token: its own top-K, the student's, or both."""

    ids_NK: Tensor  # [N,K] int64, distinct in a row; an id outside the common vocabulary (say -1) is not in S
    logprobs_NK: Tensor  # [N,K] floating, log q there; where the objective renormalises, up to a constant per token
    sampled_logprobs_N: Tensor  # [N] floating, log q(y_t); [0] unless the objective samples its tail

    def __post_init__(self) -> None:
        if self.ids_NK.shape != self.logprobs_NK.shape or self.ids_NK.dim() != 2:
            shapes = f"ids {tuple(self.ids_NK.shape)}, logprobs {tuple(self.logprobs_NK.shape)}"
            raise ValueError(f"SupportSignal: {shapes}, expected [N,K] twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSignal:
    """The teacher's final hidden states and its head: the exact signal over the whole vocabulary."""

    hidden_ND: Tensor  # [N,D] floating, state that predicts token t; D is the teacher's
    head_VD: Tensor  # [V,D] floating, the teacher's output matrix, same token ids as the student's up to the common V


Signal = SampledSignal | SupportSignal | HiddenSignal


def check_num_tokens(tokens: Tokens, *, hidden_ND: Tensor, signal_N: Tensor) -> None:
    """Raise ValueError unless the student's states and the teacher's signal have one row for each token."""
    counts = len(tokens.ids_N), len(hidden_ND), len(signal_N)
    if len(set(counts)) > 1:
        raise ValueError(f"tokens, student hidden states and teacher signal have {counts} rows, expected equal counts")
