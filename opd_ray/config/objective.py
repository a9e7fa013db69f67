"""The configuration of the objective: which divergence from the teacher is minimised, on which tokens, how weighted.

What each choice computes is said in `opd_ray.objectives`; rules over several fields stand in `validate.py`.
"""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum

_LEAST_FRACTION = 1e-6


class ObjectiveKind(StrEnum):
    """The estimator; see `opd_ray.objectives`."""

    sampled = "sampled"
    support = "support"
    full = "full"


class DivergenceKind(StrEnum):
    """What `support` and `full` minimise; p is the student, q the teacher."""

    reverse_kl = "reverse_kl"  # KL(p || q)
    forward_kl = "forward_kl"  # KL(q || p)
    jsd = "jsd"  # generalised Jensen-Shannon, by jsd_beta
    skewed_reverse_kl = "skewed_reverse_kl"  # KL(p || (1 - skew_alpha) q + skew_alpha p)
    mixed_kl = "mixed_kl"  # forward_weight KL(q || p) + (1 - forward_weight) KL(p || q)


class SupportSource(StrEnum):
    """Whose likeliest tokens make the support."""

    teacher = "teacher"
    student = "student"  # at sampling time
    union = "union"


class TailKind(StrEnum):
    """What is done about the tokens outside the support."""

    renormalise = "renormalise"
    bucket = "bucket"
    sampled_corrected = "sampled_corrected"
    sampled_uncorrected = "sampled_uncorrected"  # a baseline with a biased gradient
    none = "none"  # a baseline that is no divergence


class BaselineKind(StrEnum):
    """What `sampled` subtracts from a token's cost to lower the variance."""

    none = "none"
    kl = "kl"  # the prefix's exact KL; needs the teacher's hidden states
    group_mean = "group_mean"  # the mean cost-to-go of the prompt's other samples at the same position


class RatioKind(StrEnum):
    """How `sampled` corrects for samples of an older policy."""

    none = "none"
    truncated = "truncated"
    ppo = "ppo"


class SignalUse(StrEnum):
    """Whether the teacher's signal is differentiated or rewards the sampled token; auto: what the estimator needs."""

    auto = "auto"
    loss = "loss"
    reward = "reward"


class Normalisation(StrEnum):
    """What the sum of token losses of the global batch is divided by."""

    token_mean = "token_mean"  # the number of tokens with a loss
    sequence_mean = "sequence_mean"  # each sequence's own number, then the number of sequences


def _require(holds: bool, key: str, given: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"objective.{key}={given}: expected {expected}")


@dataclass(kw_only=True, slots=True)
class MaskConfig:
    """Which response tokens have no loss, enter no return and no metric."""

    tokens: list[str] = field(default_factory=list)  # tokens of the student's vocabulary, such as <|im_end|>
    first_only: bool = False  # tokens: only the first occurrence of each in a response, as the study has it
    out_of_support: bool = False  # tokens: also taken out of every support
    text: list[str] = field(default_factory=list)  # spans of text, however they are cut into tokens
    truncated: bool = False  # responses that hit max_response_tokens, whole
    format: str | None = None  # responses that this regular expression is not found in, whole

    def __post_init__(self) -> None:
        _require("" not in self.text, "mask.text", self.text, "texts of at least one character")
        try:
            re.compile(self.format or "")
        except re.error as error:
            _require(False, "mask.format", repr(self.format), f"a regular expression ({error})")


@dataclass(kw_only=True, slots=True)
class WeightConfig:
    """How much the loss of each token counts."""

    half_life_tokens: float | None = None  # weight 0.5^(position / half_life_tokens)
    drift_rate: float = 0.0  # weight exp(-drift_rate * accumulated log p - log q of the prefix), at most 1
    entropy_fraction: float = 1.0  # only this share of each response's tokens, those of highest student entropy

    def __post_init__(self) -> None:
        half_life = self.half_life_tokens
        _require(half_life is None or half_life > 0, "weight.half_life_tokens", half_life, "a number above 0, or null")
        rate = self.drift_rate
        _require(0 <= rate < math.inf, "weight.drift_rate", rate, "a number of at least 0")
        fraction = self.entropy_fraction
        _require(_LEAST_FRACTION <= fraction <= 1, "weight.entropy_fraction", fraction, f"{_LEAST_FRACTION:g} to 1")


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What is minimised."""

    kind: ObjectiveKind
    use_as: SignalUse = SignalUse.auto
    # support and full
    divergence: DivergenceKind = DivergenceKind.reverse_kl
    jsd_beta: float = 0.5  # 0 is the forward KL, 1 the reverse KL
    skew_alpha: float = 0.1
    forward_weight: float = 0.5
    # support
    support: SupportSource = SupportSource.teacher
    top_k: int = 32
    support_top_p: float = 1.0  # below 1: the fewest of the top_k that hold this mass
    include_sampled: bool = False  # the sampled token joins the support
    tail: TailKind = TailKind.renormalise
    # sampled
    discount: float = 0.0  # 0 is token-level, 1 is sequence-level
    baseline: BaselineKind = BaselineKind.none
    reward_clip: float | None = None  # bound on |log p - log q| of a token, nats
    ratio: RatioKind = RatioKind.truncated
    ratio_cap: float = 2.0
    ppo_clip: float = 0.2
    ppo_dual_clip: float = 3.0
    task_reward_weight: float = 0.0  # of the verifier's reward, normalised in its group
    correct_top_p: bool = False  # the policy is the student renormalised in rollout.top_p's nucleus
    # all
    normalisation: Normalisation = Normalisation.token_mean
    mask: MaskConfig = field(default_factory=MaskConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)
    equivalent_tokens: list[list[str]] = field(default_factory=list)  # classes that count as one, such as end tokens
    chunk_tokens: int = 320  # tokens whose logits are held at once; half as many with the teacher's (full)
    diagnostic_tokens: int = 256  # tokens of an update that get full-vocabulary diagnostics, per rank

    def __post_init__(self) -> None:
        for name in ("jsd_beta", "forward_weight", "discount"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number in [0, 1]")
        _require(0 <= self.skew_alpha < 1, "skew_alpha", self.skew_alpha, "a number in [0, 1)")
        _require(0 < self.support_top_p <= 1, "support_top_p", self.support_top_p, "a number in (0, 1]")
        clip = self.reward_clip
        _require(clip is None or clip > 0, "reward_clip", clip, "a number above 0, or null")
        _require(self.ratio_cap > 0, "ratio_cap", self.ratio_cap, "a number above 0")
        _require(0 < self.ppo_clip < 1, "ppo_clip", self.ppo_clip, "a number in (0, 1)")
        _require(self.ppo_dual_clip > 1, "ppo_dual_clip", self.ppo_dual_clip, "a number above 1")
        _require(self.task_reward_weight >= 0, "task_reward_weight", self.task_reward_weight, "at least 0")
        classes = self.equivalent_tokens
        named = [token for class_ in classes for token in class_]
        disjoint = len(set(named)) == len(named) and all(len(class_) >= 2 for class_ in classes)
        _require(disjoint, "equivalent_tokens", classes, "disjoint classes of at least two tokens")
        for name in ("top_k", "chunk_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        _require(self.diagnostic_tokens >= 0, "diagnostic_tokens", self.diagnostic_tokens, "an integer of at least 0")
