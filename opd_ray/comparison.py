"""What an evaluation says of student and teacher at the tokens the student has sampled; numbers, and a few texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from opd_ray.arrays import Float32, Int32

MAX_POINTS = 4096  # tokens of one task that leave the learner one by one, evenly spread over all of them
QUANTILES = (0.1, 0.5, 0.9)

Alternatives = tuple[tuple[str, float], ...]
"""Likeliest tokens and their log-probs, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPoints:
    """Some of the sampled tokens, M of them."""

    ids_M: Int32  # [M]
    positions_M: Int32  # [M] in the response, from 0
    student_logprobs_M: Float32  # [M] nats
    teacher_logprobs_M: Float32  # [M] nats
    weights_M: Float32  # [M] how many tokens each stands for: more where more were left out

    @property
    def rewards_M(self) -> Float32:
        """Return log q - log p, [M]."""
        return self.teacher_logprobs_M - self.student_logprobs_M

    def quantiles(self, chosen_M: npt.NDArray[np.bool_] | slice = slice(None)) -> list[float]:
        """Return the `QUANTILES` of log q - log p over the tokens that some of the points stand for."""
        rewards, weights = self.rewards_M[chosen_M], self.weights_M[chosen_M]
        return [float(v) for v in np.quantile(rewards, QUANTILES, weights=weights, method="inverted_cdf")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTrace:
    """One response token by token, n of them at the most some hundreds."""

    prompt: str
    tokens: tuple[str, ...]  # [n]
    student_logprobs: tuple[float, ...]  # [n] of the sampled token
    teacher_logprobs: tuple[float, ...]  # [n]
    student_top: tuple[Alternatives, ...]  # [n], or [0] from a teacher without hidden states
    teacher_top: tuple[Alternatives, ...]  # [n] or [0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Student and teacher on the responses of one task, or of one rank's part of it."""

    kl_sum: float  # of KL(student || teacher) in nats over the tokens; exact, or of the sampled tokens' log-ratios
    num_tokens: int
    sums: Mapping[str, float]  # over the same tokens, by name of the statistic
    points: TokenPoints
    token_texts: Mapping[int, str]  # of the ids in `points`
    traces: tuple[TokenTrace, ...]

    @property
    def kl(self) -> float:
        """Return the mean in nats a token."""
        return self.kl_sum / self.num_tokens

    def metrics(self) -> dict[str, float]:
        """Return the means over all tokens, and quantiles of log q - log p by way of the points."""
        means = {name: total / self.num_tokens for name, total in self.sums.items()}
        if not len(self.points.ids_M):
            return means
        quantiles = zip(QUANTILES, self.points.quantiles(), strict=True)
        return means | {f"logprob_gap_p{q * 100:.0f}": value for q, value in quantiles}


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Return the comparison over all tokens of several."""
    names = dict.fromkeys(chain.from_iterable(part.sums for part in parts))
    return Comparison(
        kl_sum=sum(part.kl_sum for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        sums={name: sum(part.sums.get(name, 0.0) for part in parts) for name in names},
        points=TokenPoints(
            **{
                name: np.concatenate([getattr(part.points, name) for part in parts])
                for name in TokenPoints.__dataclass_fields__
            }
        ),
        token_texts={id_: text for part in parts for id_, text in part.token_texts.items()},
        traces=tuple(chain.from_iterable(part.traces for part in parts)),
    )
