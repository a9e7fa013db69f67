"""What an objective is told about the tokens of a micro-batch: the tokens themselves, and one teacher's signal.

Suffixes: N flat tokens, B sequences, K support, V vocabulary rows of a head, D hidden size. Index t of a per-token
tensor speaks of token t itself. Teacher log-probs are in nats and at the rollout temperature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The sampled tokens of B whole sequences, laid end to end."""

    ids_N: Tensor  # [N] int64, sampled token; any value where mask_N is false
    offsets: Tensor  # [B+1] int64, sequence b is ids_N[offsets[b]:offsets[b+1]]; first 0, last N
    mask_N: Tensor  # [N] bool, true: the token counts in the loss

    def __post_init__(self) -> None:
        if self.ids_N.shape != self.mask_N.shape or self.ids_N.dim() != 1:
            raise ValueError(f"Tokens: ids {tuple(self.ids_N.shape)} and mask {tuple(self.mask_N.shape)}, expected [N]")
        if self.mask_N.dtype != torch.bool:
            raise ValueError(f"Tokens.mask_N has dtype {self.mask_N.dtype}, expected torch.bool")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSignal:
    """The teacher's log-prob of each sampled token."""

    logprobs_N: Tensor  # [N] floating, log q(y_t) over the full common vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportSignal:
    """The teacher's log-probs on a small set S of ids per token, such as its own top-K."""

    ids_NK: Tensor  # [N,K] int64, distinct in a row; an id outside the common vocabulary (say -1) is not in S
    logprobs_NK: Tensor  # [N,K] floating, log q at those ids, up to a constant per token

    def __post_init__(self) -> None:
        if self.ids_NK.shape != self.logprobs_NK.shape or self.ids_NK.dim() != 2:
            shapes = f"ids {tuple(self.ids_NK.shape)}, logprobs {tuple(self.logprobs_NK.shape)}"
            raise ValueError(f"SupportSignal: {shapes}, expected [N,K] twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSignal:
    """The teacher's final hidden states and its head: the exact signal over the whole vocabulary."""

    hidden_ND: Tensor  # [N,D] floating, state that predicts token t; D is the teacher's
    head_VD: Tensor  # [V,D] floating, the teacher's output matrix, same token ids as the student's up to the common V


def check_num_tokens(tokens: Tokens, *, hidden_ND: Tensor, signal_N: Tensor) -> None:
    """Raise ValueError unless the student's states and the teacher's signal have one row for each token."""
    counts = len(tokens.ids_N), len(hidden_ND), len(signal_N)
    if len(set(counts)) > 1:
        raise ValueError(f"tokens, student hidden states and teacher signal have {counts} rows, expected equal counts")
