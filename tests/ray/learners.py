"""A DeepSpeed learner on hand-made groups with exact scores, and what plain torch makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from fakes import make_request
from helpers import make_group, reference_logprobs, sampled

from opd_ray.config.objective import ObjectiveKind
from opd_ray.config.schema import Config
from opd_ray.protocol import (
    Batch,
    GroupHandle,
    GroupSummary,
    HiddenScore,
    SampledScore,
    Score,
    ScoreHandle,
    ScoreSummary,
    TrajectoryGroup,
)
from opd_ray.requests import ObjectiveIds
from workers.fleet import Berth
from workers.learner.fleet import RayLearner
from workers.learner.worker import LearnerWorker
from workers.opening import learner_arguments
from workers.placement import pools
from workers.reservation import reserve
from workers.support_codec import pack_support
from workers.weights import read_tensors

TOP_K = 5
MASKED_IDS = (2,)
EPS = 1.0  # AdamW's: its first step is then nearly the gradient itself, not only its sign
GROUPS = [
    make_group([1, 2, 3], [4, 5], [6, 7, 8, 9, 1, 2]),
    make_group([3, 3], [1], [2, 2, 2]),
    make_group([5], [7, 8], [9]),
    make_group([1, 1], [2, 3, 4, 5, 6], [7]),
]


def _hidden(model: Any, group: TrajectoryGroup) -> HiddenScore:
    rows = []
    for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True):
        ids = np.concatenate([group.prompt_ids, group.response_ids[start:end]]).astype(np.int64)
        states = model.model(torch.from_numpy(ids)[None]).last_hidden_state[0].detach()
        rows.append(states[len(group.prompt_ids) - 1 : len(ids) - 1])
    return HiddenScore(hidden_ND=torch.cat(rows).numpy(), sampled_logprobs_N=np.empty(0, dtype=np.float32))


def _score(model: Any, group: TrajectoryGroup, kind: ObjectiveKind) -> Score:
    if kind is ObjectiveKind.full:
        return _hidden(model, group)
    logprobs_NV = reference_logprobs(model, group).detach()
    if kind is ObjectiveKind.sampled:
        return SampledScore(logprobs_N=sampled(logprobs_NV, group).numpy())
    top = logprobs_NV.topk(TOP_K)
    ids_NK = top.indices.to(torch.int32).numpy()
    return pack_support(ids_NK, top.values.numpy(), sampled_logprobs_N=np.empty(0, dtype=np.float32))


def make_batch(teacher: Any, kind: ObjectiveKind = ObjectiveKind.full) -> Batch:
    """Put hand-made groups and their exact scores into the object store."""
    groups, scores = [], []
    for group, score in zip(GROUPS, exact_scores(teacher, kind), strict=True):
        scored = ScoreSummary(num_tokens=len(group.response_ids), num_bytes=1, dropped_mass_sum=0.25, score_s=0.0)
        groups.append(GroupHandle(request=make_request(), summary=ray.put(summary_of(group)), group=ray.put(group)))
        scores.append(ScoreHandle(teacher="teacher", summary=ray.put(scored), score=ray.put(score)))
    return Batch(step=0, groups=groups, scores=scores)


def exact_scores(teacher: Any, kind: ObjectiveKind = ObjectiveKind.full) -> list[Score]:
    """Return what a teacher says about the groups."""
    return [_score(teacher, group, kind) for group in GROUPS]


def summary_of(group: TrajectoryGroup) -> GroupSummary:
    """Return what the learner's fleet splits a batch by."""
    return GroupSummary(
        prompt_index=0,
        task="exact",
        num_prompt_tokens=len(group.prompt_ids),
        response_lengths=tuple(np.diff(group.offsets).tolist()),
        num_loss_tokens=len(group.response_ids),
        num_truncated=0,
        rewards=(),
        oldest_version=0,
        text="",
        generate_s=0.0,
    )


def open_learner(config: Config, log_dir: Path, worker_class: type = LearnerWorker) -> RayLearner:
    """Start the ranks on the cluster."""
    pool = pools(config)["learner"]
    berth = Berth(
        role="learner",
        pool=pool,
        placement_group=reserve([pool], timeout_s=60),
        log_dir=log_dir,
        num_threads=1,
        local=True,
    )
    learner = RayLearner(
        config=config.learner, berth=berth, arguments=learner_arguments_of(config), worker_class=worker_class
    )
    learner.wait_ready()
    return learner


def learner_arguments_of(config: Config) -> dict[str, Any]:
    """Return what a rank is built from, as a run has it."""
    masked = MASKED_IDS if config.objective.mask.tokens else ()
    return learner_arguments(
        config,
        teacher_paths={"teacher": config.teacher.path},
        vocab_size=32,
        ids=ObjectiveIds(masked=masked, equivalent=()),
    )


def published_weights(learner: RayLearner) -> dict[str, torch.Tensor]:
    """Return a copy of what the learner publishes."""
    weights = learner.publish(1)
    return {name: tensor.clone() for name, tensor in read_tensors(ray.get(weights.buffer), ray.get(weights.manifest))}


def full_kl(student: Any, teacher: Any) -> tuple[torch.Tensor, int]:
    """Return the sum of KL(student || teacher) over all response tokens, and their number."""
    total, count = torch.zeros(()), 0
    for group in GROUPS:
        log_p, log_q = reference_logprobs(student, group), reference_logprobs(teacher, group).detach()
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        count += len(group.response_ids)
    return total, count


def token_means(student: Any, teacher: Any) -> tuple[float, float, float]:
    """Return means over all response tokens: the student's entropy, the teacher's, log q - log p of the token."""
    entropies_p, entropies_q, rewards = [], [], []
    with torch.no_grad():
        for group in GROUPS:
            log_p, log_q = reference_logprobs(student, group), reference_logprobs(teacher, group)
            entropies_p.append(-(log_p.exp() * log_p).sum(-1))
            entropies_q.append(-(log_q.exp() * log_q).sum(-1))
            rewards.append(sampled(log_q, group) - sampled(log_p, group))
    entropy_p, entropy_q, reward = (float(torch.cat(of_all).mean()) for of_all in (entropies_p, entropies_q, rewards))
    return entropy_p, entropy_q, reward


def plain_optimizer(student: torch.nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer that the learner should have, for all that is trained."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)


def plain_update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> tuple[float, float]:
    """Take the update that the learner should take on a loss: clipped to norm 1, one step; return loss and norm."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return float(loss.detach()), float(norm)
