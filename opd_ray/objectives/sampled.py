"""The sampled-token objective: a policy gradient whose cost is the log-ratio of the sampled token.

Suffixes: N tokens (of a chunk, in row losses), V vocabulary, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd_ray.objectives.diagnostics import diagnose
from opd_ray.objectives.divergences import ABSENT, reverse_kl
from opd_ray.objectives.equivalence import Equivalence, merging
from opd_ray.objectives.full import divergence_of_logits
from opd_ray.objectives.head import WholeHead, head_losses, teacher_rows
from opd_ray.objectives.objective import Losses, ObjectiveOptions, PolicyOptions
from opd_ray.objectives.returns import ReturnsFromTheEnd
from opd_ray.objectives.rows import RowLosses, common_vocabulary, exponentiate_, logsumexp, scale_, widest_dtype
from opd_ray.objectives.signals import HiddenSignal, SampledSignal, Tokens, check_num_tokens

TeacherLogprobs = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows of a chunk, the student's logits there) -> log q(y_t) [N] and the baseline KL(p || q) [N] or zeros"""


def losses(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    tokens: Tokens,
    signal: SampledSignal | HiddenSignal,
    options: ObjectiveOptions,
) -> Losses:
    """Return loss_t = C_t * rho_t, whose gradient is C_t rho_t grad(log p(y_t)); descending it lowers the KL.

    r_t = log p(y_t) - log q(y_t), clipped to +-reward_clip, is the cost of a token under the current student, 0 where
    masked; C_t = sum_{t' >= t} discount^(t' - t) r_t' - KL_t - advantages_N[t], held constant, where KL_t is the
    prefix's KL(p || q) with `kl_baseline` (arXiv 2605.07865) and 0 without. rho_t = p(y_t) / p_sampler(y_t) corrects
    for samples of an older policy:
    - `none`: counted as 1;
    - `truncated`: min(rho, ratio_cap), held constant (truncated importance sampling);
    - `ppo`: the clipped surrogate with dual clip (arXiv 1912.09729): a token whose ratio has moved beyond the clip in
      the direction that its advantage rewards has no gradient.
    With policy.top_p < 1 (samples from a nucleus), p is the student renormalised in its own top-p nucleus; y_t joins
    it where it has left it since.

    discount 1: unbiased for the gradient of the sequence KL, variance up to T^4. 0: variance up to T^2; the expected
    gradient is that of the token KLs at fixed prefixes, the one that `full` computes without noise. Baselines change
    no expectation. divergence_N is r_t, unclipped: the k1 estimator of KL(p || q), unbiased and of either sign.
    Stats: `signal`, |r_t|, `negative_reward`, r_t > 0, `reward_clipped`, `ratio`, `ratio_squared`, `ratio_clipped`.
    hidden_ND [N,D], head_VD [V,D]; nats. Source: arXiv 2603.25562.
    Choose it when a teacher can give no more than the log-prob of the sampled token, or with a task reward.
    """
    states_N = signal.hidden_ND if isinstance(signal, HiddenSignal) else signal.logprobs_N
    check_num_tokens(tokens, hidden_ND=hidden_ND, signal_N=states_N)
    tokens = tokens.cleared()
    dtype = widest_dtype(hidden_ND, head_VD)
    heads = (head_VD, signal.head_VD) if isinstance(signal, HiddenSignal) else (head_VD,)
    vocab_size = common_vocabulary(options.vocab_size, *heads)
    equivalence = Equivalence.of(options.equivalent_ids, device=hidden_ND.device, vocab_size=vocab_size)
    ids_N, chunk_tokens = equivalence.canonical(tokens.ids_N), options.chunk_tokens
    if isinstance(signal, HiddenSignal):
        chunk_tokens = max(1, chunk_tokens // 2)
        logits_of = teacher_rows(signal, tokens=tokens, vocab_size=vocab_size, options=options, dtype=dtype)
        teacher = _from_logits(logits_of, ids_N=ids_N, equivalence=equivalence, kl_baseline=options.policy.kl_baseline)
    else:
        _require_no_baseline(options.policy)
        teacher = _from_logprobs(signal.logprobs_N.detach().to(dtype).masked_fill(~tokens.mask_N, 0))
    rows = _PolicyRows(
        tokens=tokens,
        ids_N=ids_N,
        equivalence=equivalence,
        teacher=teacher,
        returns=ReturnsFromTheEnd(offsets=tokens.offsets, discount=options.policy.discount),
        policy=options.policy,
    )
    result = head_losses(
        hidden_ND,
        head_VD,
        head=WholeHead(head_VD, vocab_size=vocab_size, dtype=dtype, chunk_tokens=chunk_tokens),
        row_loss=rows,
        tokens=tokens,
        temperature=options.temperature,
    )
    return result.with_diagnostics(diagnose(hidden_ND, head_VD, tokens=tokens, options=options))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PolicyRows:
    """The row loss: called with the chunks of a micro-batch in turn, last chunk first."""

    tokens: Tokens
    ids_N: Tensor  # canonical
    equivalence: Equivalence
    teacher: TeacherLogprobs
    returns: ReturnsFromTheEnd
    policy: PolicyOptions

    def __call__(self, rows: slice, logits_NV: Tensor, wanted: bool) -> RowLosses:
        own_N = logits_NV.gather(1, self.tokens.ids_N[rows][:, None]).squeeze(1)
        return merging(partial(self._merged, own_N), self.equivalence, ids_N=self.tokens.ids_N)(rows, logits_NV, wanted)

    def _merged(self, own_N: Tensor, rows: slice, logits_NV: Tensor, wanted: bool) -> RowLosses:
        """Return the losses on logits with classes merged; own_N are those of the sampled ids themselves."""
        dtype, ids_N1 = logits_NV.dtype, self.ids_N[rows][:, None]
        if self.policy.top_p < 1:
            _cut_to_nucleus(logits_NV, ids_N1=ids_N1, top_p=self.policy.top_p)
        teacher_N, baseline_N = self.teacher(rows, logits_NV)
        sampled_N = logits_NV.gather(1, ids_N1).squeeze(1)
        largest_N, total_N = exponentiate_(logits_NV)
        lse_N = largest_N + total_N.log()
        logprobs_N = sampled_N - lse_N
        cost_N = (logprobs_N - teacher_N).masked_fill(~self.tokens.mask_N[rows], 0)
        clip = torch.inf if self.policy.reward_clip is None else self.policy.reward_clip
        return_N = self.returns.of(cost_N.clamp(-clip, clip), rows)
        loss_N, slope_N, stats = _policy_loss(
            return_N - baseline_N - self.tokens.advantages_N[rows].to(dtype),
            # Of the id and not of its class: the sampler's log-prob is of the id as well.
            log_ratio_N=own_N - lse_N - self.tokens.sampler_logprobs_N[rows].to(dtype),
            policy=self.policy,
        )
        if wanted:  # slope * (onehot(y) - p)
            scale_(logits_NV, -slope_N / total_N)
            logits_NV.scatter_add_(1, ids_N1, slope_N[:, None])
        return RowLosses(
            loss_N=loss_N,
            slope_NV=logits_NV if wanted else None,
            divergence_N=cost_N,
            logprobs_N=logprobs_N,
            stats={
                "signal": cost_N.abs(),
                "negative_reward": (cost_N > 0).to(dtype),
                "reward_clipped": (cost_N.abs() > clip).to(dtype),
                **stats,
            },
        )


def _policy_loss(
    cost_N: Tensor, *, log_ratio_N: Tensor, policy: PolicyOptions
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the surrogate loss [N], its derivative with respect to log p(y_t) [N], and stats."""
    ratio_N = log_ratio_N.exp()
    if policy.ratio == "ppo":
        raw_N, clipped_N = ratio_N * cost_N, ratio_N.clamp(1 - policy.ppo_clip, 1 + policy.ppo_clip) * cost_N
        limit_N = torch.where(cost_N > 0, policy.ppo_dual_clip * cost_N, torch.inf)
        loss_N = torch.minimum(torch.maximum(raw_N, clipped_N), limit_N)
        is_clipped_N = (raw_N < clipped_N) | (raw_N > limit_N)
        slope_N = raw_N.masked_fill(is_clipped_N, 0)
    else:
        cap = policy.ratio_cap if policy.ratio == "truncated" else torch.inf
        is_clipped_N = ratio_N > cap
        weight_N = ratio_N.clamp(max=cap) if policy.ratio == "truncated" else torch.ones_like(ratio_N)
        loss_N = slope_N = weight_N * cost_N
    stats = {"ratio": ratio_N, "ratio_squared": ratio_N.square(), "ratio_clipped": is_clipped_N.to(ratio_N.dtype)}
    return loss_N, slope_N, stats


def _from_logprobs(logprobs_N: Tensor) -> TeacherLogprobs:
    return lambda rows, _: (logprobs_N[rows], torch.zeros_like(logprobs_N[rows]))


def _require_no_baseline(policy: PolicyOptions) -> None:
    if policy.kl_baseline:
        raise ValueError("objective.baseline = kl: the teacher sent sampled log-probs, expected hidden states")


def _from_logits(
    logits_of: Callable[[slice], Tensor], *, ids_N: Tensor, equivalence: Equivalence, kl_baseline: bool
) -> TeacherLogprobs:
    def of(rows: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        teacher_NV = equivalence.merge(logits_of(rows))
        logprobs_N = teacher_NV.gather(1, ids_N[rows][:, None]).squeeze(1) - logsumexp(teacher_NV)
        if not kl_baseline:
            return logprobs_N, torch.zeros_like(logprobs_N)
        baseline_N, *_ = divergence_of_logits(logits_NV.clone(), teacher_NV, divergence=reverse_kl(), wanted=False)
        return logprobs_N, baseline_N

    return of


def _cut_to_nucleus(logits_NV: Tensor, *, ids_N1: Tensor, top_p: float) -> None:
    """Make every id outside the smallest set of mass >= top_p absent, in place; the sampled id always stays.

    The columns are outcomes: of a class of equivalent ids the whole mass.
    """
    sorted_NV = logits_NV.sort(dim=-1, descending=True).values
    before_NV = sorted_NV.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before_NV[:, 0] = 0
    size_N1 = (before_NV < top_p).sum(-1, keepdim=True)
    outside_NV = logits_NV < sorted_NV.gather(1, size_N1 - 1)
    logits_NV.masked_fill_(outside_NV.scatter_(1, ids_N1, False), ABSENT)
