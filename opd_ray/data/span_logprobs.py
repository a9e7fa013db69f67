"""The teacher's log-probs of its own tokens, laid on the student's tokens of the same text.

Array suffixes: N student tokens, M teacher tokens, S spans. Log-probs are in nats, at the rollout temperature.
"""

from dataclasses import dataclass

import numpy as np

from opd_ray.data.alignment import Alignment, Bool
from opd_ray.protocol import Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadLogprobs:
    """What the teacher says about each student token."""

    logprobs_N: Float32  # [N] what `sampled` takes for log q(y_t)
    valid_N: Bool  # [N] false: the teacher says nothing about the token, which belongs in no loss

    def __post_init__(self) -> None:
        if self.logprobs_N.shape != self.valid_N.shape:
            raise ValueError(f"SpreadLogprobs: {self.logprobs_N.shape} and {self.valid_N.shape}, expected [N] twice")


def spread(
    logprobs_M: Float32, *, alignment: Alignment, sampled_logprobs_N: Float32, loss_mask_N: Bool
) -> SpreadLogprobs:
    """Give every student token of a span an equal share of the span's log-ratio.

    For token t of a span S, with s_t its log-prob under the policy that sampled it, and Q_S the sum of the teacher's
    log-probs in S:

        q_t = s_t + (Q_S - sum_{u in S} s_u) / |S|;  where |S| = 1, q_t = Q_S, to the bit.

    - sum_{t in S} q_t = Q_S: the costs log p(y_t) - q_t of a span sum to log p(S) - log q(S) under every student p,
      also one that has moved on from the sampler's.
    - where both models find a span equally likely no token of it costs anything. Q_S / |S|, which needs no s_t, would
      reward the rare tokens of such a span and punish the others.
    - at discount 0 every token of S is pushed by the same share of what S costs: the policy gradient of S as one
      action, over |S|. With the whole ratio on the last token, the others would never learn.
    The price: the share of an early token depends on later ones in its span, and at discount > 0 their returns miss
    it, a bias that stays inside the span. The whole ratio on the last token would not be free of bias either: whether
    a span ends at a byte may itself depend on the bytes that follow.

    Q_S is the log-prob of the teacher's own tokens for the text, a lower bound of its log-prob of the text. A token is
    not valid where the teacher's tokens do not cover the span, and in a span that holds a token which the policy did
    not choose (loss_mask_N false); there q_t = s_t, which costs nothing. Lengths that do not fit raise ValueError.
    """
    spans_N, num_spans = alignment.student_spans_N, len(alignment.covered_S)
    for name, given, expected in (
        ("teacher log-probs", len(logprobs_M), len(alignment.teacher_spans_M)),
        ("sampled log-probs", len(sampled_logprobs_N), len(spans_N)),
        ("loss mask entries", len(loss_mask_N), len(spans_N)),
    ):
        if given != expected:
            raise ValueError(f"{given} {name} for an alignment of {expected} tokens, expected equal counts")
    teacher_S = np.bincount(alignment.teacher_spans_M, weights=logprobs_M, minlength=num_spans)
    sampler_S = np.bincount(spans_N, weights=sampled_logprobs_N, minlength=num_spans)
    size_S = np.bincount(spans_N, minlength=num_spans)
    is_chosen_S = np.bincount(spans_N, weights=~loss_mask_N, minlength=num_spans) == 0
    valid_N = (alignment.covered_S & is_chosen_S)[spans_N]
    shared_N = sampled_logprobs_N + ((teacher_S - sampler_S) / size_S)[spans_N]
    teacher_N = np.where(size_S[spans_N] == 1, teacher_S[spans_N], shared_N)
    return SpreadLogprobs(
        logprobs_N=np.where(valid_N, teacher_N, sampled_logprobs_N).astype(np.float32), valid_N=valid_N
    )
