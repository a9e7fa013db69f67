"""What every objective is: its contract, its options and its result."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from opd_ray.objectives.divergences import Divergence, reverse_kl

Payload = Literal["sampled", "support", "hidden"]
Tail = Literal["renormalise", "bucket", "sampled_corrected", "sampled_uncorrected", "none"]


def _require(holds: bool, *, key: str, given: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {given}: expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """The numbers of `sampled`, the policy gradient."""

    discount: float = 0.0  # gamma: 0 is token-level, 1 is sequence-level
    kl_baseline: bool = False  # subtract KL(p || q) at the prefix; needs the teacher's hidden states
    reward_clip: float | None = None  # bound on |log p - log q| of a token
    ratio: Literal["none", "truncated", "ppo"] = "none"  # importance ratio of stale samples
    ratio_cap: float = 2.0  # truncated: the largest weight
    ppo_clip: float = 0.2  # ppo: the ratio may move this far from 1
    ppo_dual_clip: float = 3.0  # ppo: bounds the loss of tokens with a negative advantage; above 1
    top_p: float = 1.0  # below 1: the policy is the student renormalised in its top-p nucleus

    def __post_init__(self) -> None:
        _require(0 <= self.discount <= 1, key="objective.discount", given=self.discount, expected="a number in [0, 1]")
        clip = self.reward_clip
        _require(
            clip is None or clip > 0, key="objective.reward_clip", given=clip, expected="a number above 0, or null"
        )
        _require(self.ratio_cap > 0, key="objective.ratio_cap", given=self.ratio_cap, expected="a number above 0")
        _require(0 < self.ppo_clip < 1, key="objective.ppo_clip", given=self.ppo_clip, expected="a number in (0, 1)")
        dual = self.ppo_dual_clip
        _require(dual > 1, key="objective.ppo_dual_clip", given=dual, expected="a number above 1")
        _require(0 < self.top_p <= 1, key="rollout.top_p", given=self.top_p, expected="a number in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOptions:
    """What an objective needs to know besides the tokens and the signal. The defaults change nothing."""

    temperature: float = 1.0  # divides the logits of both models; the rollout's, not 0
    divergence: Divergence = field(default_factory=reverse_kl)  # support, full
    tail: Tail = "renormalise"  # support: what is done about the tokens outside S
    policy: PolicyOptions = field(default_factory=PolicyOptions)  # sampled
    equivalent_ids: tuple[tuple[int, ...], ...] = ()  # classes of ids that count as their first member, such as ends
    entropy_fraction: float = 1.0  # below 1: only this share of each sequence's tokens, of highest entropy, has a loss
    vocab_size: int = 0  # ids below it are common to both models; 0: the smallest head at hand
    chunk_tokens: int = 320  # tokens whose logits are held at once; half as many where the teacher's are as well
    diagnostic_tokens: int = 0  # leading tokens that get full-vocabulary diagnostics

    def __post_init__(self) -> None:
        _require(self.temperature > 0, key="rollout.temperature", given=self.temperature, expected="a number above 0")
        _require(self.vocab_size >= 0, key="vocab_size", given=self.vocab_size, expected="a count, or 0 for all rows")
        _require(
            self.chunk_tokens >= 1, key="objective.chunk_tokens", given=self.chunk_tokens, expected="at least 1 token"
        )
        _require(
            self.diagnostic_tokens >= 0, key="diagnostic_tokens", given=self.diagnostic_tokens, expected="a count or 0"
        )
        fraction = self.entropy_fraction
        _require(0 < fraction <= 1, key="objective.entropy_fraction", given=fraction, expected="a number in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The result on a micro-batch, in nats; per-token tensors are detached and exactly 0 where masked.

    Dtype float32, or float64 where the student's states or head are.
    """

    loss: Tensor  # [] sum_n weights_N[n] * loss_N[n], differentiable once in states and head
    loss_N: Tensor  # [N]
    divergence_N: Tensor  # [N] estimate of the divergence at the token's prefix, by this estimator
    sampled_logprobs_N: Tensor  # [N] log p(y_t), in the nucleus with policy.top_p < 1; [0] where the objective never
    # normalises over the vocabulary
    stats: dict[str, Tensor]  # name -> [N], to be averaged over unmasked tokens; always `signal`, how far the
    # teacher is from the student: |log p(y_t) - log q(y_t)| or its expectation; where log q(y_t) is known also
    # `negative_reward`, 1 where it is below log p(y_t)
    diagnostics: dict[str, Tensor]  # name -> [M] of the first M tokens, M = min(N, options.diagnostic_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One way to turn a teacher's signal into a loss per token.

    losses(hidden_ND, head_VD, *, tokens, signal, options) -> Losses, where hidden_ND [N,D] are the student's final
    states, head_VD [V,D] its output matrix, and `signal` is the dataclass that the payload names. Gradients reach
    hidden_ND and head_VD alike; they are formed in the forward pass, so that nothing of size [N,V] is ever held.
    """

    payload: Callable[[ObjectiveOptions], Payload]  # what the teacher is asked for
    losses: Callable[..., Losses]
