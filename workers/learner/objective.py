"""What the configured objective means on a rank: its options, and which tokens count how much in a batch.

Suffixes: N flat response tokens of the rank's share of a batch, B trajectories.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_ray.config.objective import BaselineKind, DivergenceKind, Normalisation, ObjectiveConfig
from opd_ray.data.token_text import token_bytes
from opd_ray.objectives import (
    Divergence,
    ObjectiveOptions,
    PolicyOptions,
    forward_kl,
    generalised_jsd,
    mixed_kl,
    reverse_kl,
    skewed_reverse_kl,
)
from opd_ray.objectives.masks import matches_format, sequences_kept, special_tokens_kept, text_spans_kept
from opd_ray.objectives.returns import discounted_returns
from opd_ray.objectives.weights import (
    drift_weights,
    group_normalised,
    leave_one_out_returns,
    num_top_entropy,
    position_weights,
    sequence_mean_weights,
)
from opd_ray.protocol import Finish, SampledScore, Score, TrajectoryGroup
from opd_ray.requests import ObjectiveIds


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSetup:
    """The objective and what it must know of the rest of the run."""

    config: ObjectiveConfig
    ids: ObjectiveIds
    temperature: float  # the rollout's
    top_p: float  # the rollout's
    vocab_size: int  # ids below it are common to all models
    loss_weights: Mapping[str, float]  # by task; 1 for a task without an entry


def objective_options(setup: ObjectiveSetup) -> ObjectiveOptions:
    """Return the numbers of the objective."""
    config = setup.config
    return ObjectiveOptions(
        temperature=setup.temperature,
        divergence=_divergence(config),
        tail=config.tail.value,
        policy=PolicyOptions(
            discount=config.discount,
            kl_baseline=config.baseline is BaselineKind.kl,
            reward_clip=config.reward_clip,
            ratio=config.ratio.value,
            ratio_cap=config.ratio_cap,
            ppo_clip=config.ppo_clip,
            ppo_dual_clip=config.ppo_dual_clip,
            top_p=setup.top_p if config.correct_top_p else 1.0,
        ),
        equivalent_ids=setup.ids.equivalent,
        entropy_fraction=config.weight.entropy_fraction,
        vocab_size=setup.vocab_size,
        chunk_tokens=config.chunk_tokens,
    )


def removed_ids(setup: ObjectiveSetup) -> tuple[int, ...]:
    """Return the ids that are taken out of every support: masked ones, or the ids that stand for their classes."""
    if not setup.config.mask.out_of_support:
        return ()
    stands_for = {id_: class_[0] for class_ in setup.ids.equivalent for id_ in class_}
    return tuple(stands_for.get(id_, id_) for id_ in setup.ids.masked)


def _divergence(config: ObjectiveConfig) -> Divergence:
    match config.divergence:
        case DivergenceKind.reverse_kl:
            return reverse_kl()
        case DivergenceKind.forward_kl:
            return forward_kl()
        case DivergenceKind.jsd:
            return generalised_jsd(config.jsd_beta)
        case DivergenceKind.skewed_reverse_kl:
            return skewed_reverse_kl(config.skew_alpha)
        case DivergenceKind.mixed_kl:
            return mixed_kl(config.forward_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlan:
    """How much each token of a rank's share counts."""

    kept_N: Tensor  # bool: enters losses, returns and metrics
    weights_N: Tensor  # float32, of each token's loss, before the division by the global denominator
    advantages_N: Tensor  # float32, see `Tokens`
    denominator: float  # this rank's share: its tokens, or its sequences, with a loss


def sampled_tokens(groups: Sequence[TrajectoryGroup], scores: Sequence[Score]) -> TokenPlan:
    """Return the plan in which every token that the policy chose counts alike."""
    kept_N = torch.from_numpy(np.concatenate([group.loss_mask for group in groups])) & _valid(groups, scores)
    return TokenPlan(
        kept_N=kept_N,
        weights_N=kept_N.float(),
        advantages_N=torch.zeros(len(kept_N)),
        denominator=float(kept_N.sum()),
    )


class TokenPlanner:
    """Masks, weights and advantages of the objective, from what sampler, teacher and verifier say."""

    def __init__(self, setup: ObjectiveSetup, *, tokenizer: Any) -> None:
        self._config = setup.config
        self._loss_weights = setup.loss_weights
        self._masked_ids = setup.ids.masked
        mask = self._config.mask
        self._spans = [span.encode() for span in mask.text]
        reads_text = bool(self._spans) or mask.format is not None
        self._pieces = token_bytes(tokenizer) if reads_text else []

    def plan(self, groups: Sequence[TrajectoryGroup], scores: Sequence[Score]) -> TokenPlan:
        """Return the plan of all tokens of all groups, laid end to end."""
        lengths = np.concatenate([np.diff(group.offsets) for group in groups])
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        kept_N = self._kept(groups, offsets) & _valid(groups, scores)
        weights_N, denominator = self._normalised(kept_N, offsets)
        if any(self._loss_weights.get(group.task, 1.0) != 1 for group in groups):
            of_groups = torch.tensor([self._loss_weights.get(group.task, 1.0) for group in groups])
            weights_N = weights_N * of_groups.repeat_interleave(torch.tensor([len(g.response_ids) for g in groups]))
        costs_N = _sampled_costs(groups, scores, kept_N=kept_N)
        weight = self._config.weight
        if weight.half_life_tokens is not None:
            weights_N = weights_N * position_weights(offsets, half_life=weight.half_life_tokens)
        if weight.drift_rate > 0:
            weights_N = weights_N * drift_weights(costs_N, offsets=offsets, rate=weight.drift_rate)
        return TokenPlan(
            kept_N=kept_N,
            weights_N=weights_N,
            advantages_N=self._advantages(groups, costs_N, offsets),
            denominator=denominator,
        )

    def _kept(self, groups: Sequence[TrajectoryGroup], offsets: Tensor) -> Tensor:
        mask = self._config.mask
        ids_N = torch.from_numpy(np.concatenate([group.response_ids for group in groups]).astype(np.int64))
        kept_N = torch.from_numpy(np.concatenate([group.loss_mask for group in groups]))
        if self._masked_ids:
            kept_N = kept_N & special_tokens_kept(
                ids_N, offsets=offsets, special_ids=self._masked_ids, first_only=mask.first_only
            )
        if mask.truncated:
            finish_B = torch.from_numpy(np.concatenate([group.finish for group in groups]))
            kept_N = kept_N & sequences_kept(finish_B != Finish.length.value, offsets=offsets)
        if self._pieces:
            pieces = [self._pieces[id_] if id_ < len(self._pieces) else b"" for id_ in ids_N.tolist()]
            kept_N = kept_N & text_spans_kept(pieces, offsets=offsets, spans=self._spans)
            if mask.format is not None:
                texts = [
                    b"".join(pieces[a:b]).decode(errors="replace") for a, b in itertools.pairwise(offsets.tolist())
                ]
                kept_N = kept_N & sequences_kept(matches_format(texts, pattern=mask.format), offsets=offsets)
        return kept_N

    def _normalised(self, kept_N: Tensor, offsets: Tensor) -> tuple[Tensor, float]:
        """Return the weights of the chosen mean and this rank's part of its denominator."""
        with_loss_B = num_top_entropy(kept_N, offsets=offsets, fraction=self._config.weight.entropy_fraction)
        if self._config.normalisation is Normalisation.token_mean:
            return kept_N.float(), float(with_loss_B.sum())
        # Of the kept tokens those of high entropy have the loss: the sequence's mean is over these.
        num_kept_B = num_top_entropy(kept_N, offsets=offsets, fraction=1.0)
        share_B = num_kept_B / with_loss_B.clamp(min=1)
        weights_N = sequence_mean_weights(kept_N, offsets=offsets) * torch.repeat_interleave(share_B, offsets.diff())
        return weights_N, float((with_loss_B > 0).sum())

    def _advantages(self, groups: Sequence[TrajectoryGroup], costs_N: Tensor, offsets: Tensor) -> Tensor:
        """Return minus the baseline of the advantage -(cost-to-go), plus the task reward."""
        config = self._config
        advantages_N = torch.zeros(int(offsets[-1]))
        group_B = torch.repeat_interleave(torch.tensor([len(group.offsets) - 1 for group in groups]))
        if config.baseline is BaselineKind.group_mean:
            clip = math.inf if config.reward_clip is None else config.reward_clip
            returns_N = discounted_returns(costs_N.clamp(-clip, clip), offsets=offsets, discount=config.discount)
            advantages_N = advantages_N + leave_one_out_returns(returns_N, offsets=offsets, group_B=group_B)
        if config.task_reward_weight > 0:
            if any(len(group.rewards) == 0 for group in groups):
                raise ValueError(
                    f"objective.task_reward_weight={config.task_reward_weight}: prompts without a reference answer have"
                    " no reward; give every prompt an `answer`, or set it to 0"
                )
            rewards_B = torch.from_numpy(np.concatenate([group.rewards for group in groups]))
            normalised_B = config.task_reward_weight * group_normalised(rewards_B, group_B=group_B)
            advantages_N = advantages_N + torch.repeat_interleave(normalised_B, offsets.diff())
        return advantages_N


def _valid(groups: Sequence[TrajectoryGroup], scores: Sequence[Score]) -> Tensor:
    """Return false at the tokens of which a teacher with another tokenizer says nothing, [N]."""
    return torch.cat(
        [
            torch.from_numpy(score.valid_N)
            if isinstance(score, SampledScore) and len(score.valid_N)
            else torch.ones(len(group.response_ids), dtype=torch.bool)
            for group, score in zip(groups, scores, strict=True)
        ]
    )


def _sampled_costs(groups: Sequence[TrajectoryGroup], scores: Sequence[Score], *, kept_N: Tensor) -> Tensor:
    """Return log p_sampler - log q of the sampled tokens [N], 0 where masked or where the teacher did not say."""
    given = [score.logprobs_N if isinstance(score, SampledScore) else score.sampled_logprobs_N for score in scores]
    if sum(map(len, given)) != len(kept_N):
        return torch.zeros(len(kept_N))
    sampler_N = np.concatenate([group.sampled_logprobs for group in groups])
    return torch.from_numpy(sampler_N - np.concatenate(given)).masked_fill(~kept_N, 0)
