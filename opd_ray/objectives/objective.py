"""What every objective is: the callable's contract, its options and its result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Payload = Literal["sampled", "support", "hidden"]


def _require(holds: bool, *, key: str, given: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {given}: expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOptions:
    """The numbers that an objective needs."""

    temperature: float = 1.0  # divides the logits of both models; the rollout's, not 0
    discount: float = 0.0  # sampled only: 0 is token-level, 1 is sequence-level
    vocab_size: int = 0  # ids below it are common to both models; 0: the smallest head at hand
    chunk_tokens: int = 512  # tokens whose logits over the vocabulary are held at once
    diagnostic_tokens: int = 256  # support only: leading tokens that get a full-vocabulary log-prob; 0 spares the cost

    def __post_init__(self) -> None:
        _require(self.temperature > 0, key="rollout.temperature", given=self.temperature, expected="a number above 0")
        _require(0 <= self.discount <= 1, key="objective.discount", given=self.discount, expected="a number in [0, 1]")
        _require(self.vocab_size >= 0, key="vocab_size", given=self.vocab_size, expected="a count, or 0 for all rows")
        _require(
            self.chunk_tokens >= 1, key="objective.chunk_tokens", given=self.chunk_tokens, expected="at least 1 token"
        )
        _require(
            self.diagnostic_tokens >= 0, key="diagnostic_tokens", given=self.diagnostic_tokens, expected="a count or 0"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """Per-token results in nats, float32 (float64 when the student's states or head are); exactly 0 where masked."""

    loss_N: Tensor  # [N] differentiable; the learner minimises its sum over the global count of unmasked tokens
    divergence_N: Tensor  # [N] detached estimate of KL(student || teacher) at the token's prefix, by this estimator
    sampled_logprobs_N: Tensor  # [M], M <= N, detached log p(y_t) of the first M tokens; M < N for support only


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One way to turn a teacher's signal into a loss per token.

    token_losses(hidden_ND, head_VD, *, tokens, signal, options) -> TokenLosses, where hidden_ND [N,D] are the
    student's final states, head_VD [V,D] its output matrix, and `signal` is the dataclass that `payload` names.
    Gradients reach hidden_ND and head_VD alike.
    """

    payload: Payload  # what the teacher is asked for
    token_losses: Callable[..., TokenLosses]
