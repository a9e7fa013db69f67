"""The learner's DeepSpeed ranks on a real Ray cluster, against one plain torch update."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from fakes import make_request
from helpers import compose_config, make_group, reference_logprobs, reference_model, sampled
from transformers import AutoModelForCausalLM

from opd_ray.config.objective import MaskConfig, Normalisation, ObjectiveConfig, ObjectiveKind, RatioKind
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
from workers import connected
from workers.fleet import Berth
from workers.learner.fleet import RayLearner
from workers.learner.objective import ObjectiveSetup
from workers.placement import pools
from workers.reservation import reserve
from workers.support_codec import pack_support
from workers.sync.choose import SyncPlan
from workers.weights import read_tensors

pytestmark = pytest.mark.ray

_TOP_K = 5
_MASKED_IDS = (2,)
_EPS = 1.0  # AdamW's: its first step is then nearly the gradient itself, not only its sign
_GROUPS = [
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
    top = logprobs_NV.topk(_TOP_K)
    ids_NK = top.indices.to(torch.int32).numpy()
    return pack_support(ids_NK, top.values.numpy(), sampled_logprobs_N=np.empty(0, dtype=np.float32))


def _batch(teacher: Any, kind: ObjectiveKind = ObjectiveKind.full) -> Batch:
    """Put hand-made groups and their exact scores into the object store."""
    groups, scores = [], []
    for group in _GROUPS:
        summary = GroupSummary(
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
        scored = ScoreSummary(num_tokens=len(group.response_ids), num_bytes=1, dropped_mass_sum=0.25, score_s=0.0)
        groups.append(GroupHandle(request=make_request(), summary=ray.put(summary), group=ray.put(group)))
        scores.append(
            ScoreHandle(teacher="teacher", summary=ray.put(scored), score=ray.put(_score(teacher, group, kind)))
        )
    return Batch(step=0, groups=groups, scores=scores)


def _open_learner(config: Config, log_dir: Path) -> RayLearner:
    pool = pools(config)["learner"]
    berth = Berth(
        role="learner",
        pool=pool,
        placement_group=reserve([pool], timeout_s=60),
        log_dir=log_dir,
        num_threads=1,
        local=True,
    )
    arguments = {
        "student_path": config.student.path,
        "teacher_paths": {"teacher": config.teacher.path},
        "objective": ObjectiveSetup(
            config=config.objective,
            ids=ObjectiveIds(masked=_MASKED_IDS if config.objective.mask.tokens else (), equivalent=()),
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            vocab_size=32,
            loss_weights={},
        ),
        "num_steps": config.num_steps,
        "sync": SyncPlan.of(config),
    }
    learner = RayLearner(config=config.learner, berth=berth, arguments=arguments)
    learner.wait_ready()
    return learner


def _published(learner: RayLearner) -> dict[str, torch.Tensor]:
    weights = learner.publish(1)
    return {name: tensor.clone() for name, tensor in read_tensors(ray.get(weights.buffer), ray.get(weights.manifest))}


def _full_kl(student: Any, teacher: Any) -> tuple[torch.Tensor, int]:
    """Return the sum of KL(student || teacher) over all response tokens, and their number."""
    total, count = torch.zeros(()), 0
    for group in _GROUPS:
        log_p, log_q = reference_logprobs(student, group), reference_logprobs(teacher, group).detach()
        total = total + (log_p.exp() * (log_p - log_q)).sum()
        count += len(group.response_ids)
    return total, count


def _masked_sequence_means(student: Any, teacher: Any, kind: ObjectiveKind) -> torch.Tensor:
    """Return the mean over trajectories of the mean loss of their tokens, the masked ids left out of everything."""
    means = []
    for group in _GROUPS:
        log_p, log_q = reference_logprobs(student, group), reference_logprobs(teacher, group).detach()
        kept = torch.tensor([token not in _MASKED_IDS for token in group.response_ids])
        if kind is ObjectiveKind.support:
            q_NK, ids_NK = log_q.topk(_TOP_K)
            p_NK, q_NK = log_p.gather(1, ids_NK).log_softmax(-1), q_NK.log_softmax(-1)
            losses = (p_NK.exp() * (p_NK - q_NK)).sum(-1)
        else:
            costs = (sampled(log_p, group).detach() - sampled(log_q, group)) * kept
            losses = naive_returns(costs, group, discount=0.5) * sampled(log_p, group)
        for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True):
            if kept[start:end].any():
                means.append((losses * kept)[start:end].sum() / kept[start:end].sum())
    return torch.stack(means).mean()


def naive_returns(costs: torch.Tensor, group: TrajectoryGroup, *, discount: float) -> torch.Tensor:
    """Return the discounted sum of the costs from each token to the end of its trajectory."""
    ends = np.repeat(group.offsets[1:], np.diff(group.offsets))
    return torch.stack([sum(discount ** (u - t) * costs[u] for u in range(t, ends[t])) for t in range(len(costs))])


def _plain_update(student: Any, loss: torch.Tensor, *, lr: float) -> float:
    """Take the update that the learner should take on a loss: clipped to norm 1, one AdamW step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), eps=_EPS, weight_decay=0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@pytest.fixture
def config(overrides: Callable[..., list[str]]) -> Config:
    return compose_config(overrides())


@pytest.fixture
def cluster(config: Config) -> Iterator[None]:
    with connected(config):
        yield


@pytest.mark.parametrize(
    ("tied", "cut"),
    [
        (False, {"zero_stage": 0, "num_ranks": 2, "max_tokens_per_micro_batch": 64}),
        (True, {"zero_stage": 2, "num_ranks": 2, "max_tokens_per_micro_batch": 9}),
        (False, {"zero_stage": 3, "num_ranks": 2, "max_tokens_per_micro_batch": 16}),
        (True, {"zero_stage": 3, "num_ranks": 2, "max_tokens_per_micro_batch": 64}),
        (False, {"zero_stage": 2, "num_ranks": 1, "max_tokens_per_micro_batch": 10}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else f"tied={value}",
)
@pytest.mark.usefixtures("cluster")
def test_one_update_is_the_plain_torch_update_however_it_is_cut(
    config: Config, tmp_path: Path, model_folder: Any, tied: bool, cut: dict[str, int]
) -> None:
    config.student.path = model_folder(seed=1, tied=tied)
    config.learner = replace(config.learner, lr=1.0, engine_args={"optimizer": {"params": {"eps": _EPS}}}, **cut)
    student, teacher = reference_model(config.student.path), reference_model(config.teacher.path)
    learner = _open_learner(config, tmp_path)
    batch = _batch(teacher)

    metrics = learner.update(batch)
    published = _published(learner)

    total, count = _full_kl(student, teacher)
    loss = _plain_update(student, total / count, lr=config.learner.lr)
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["distill/reverse_kl_full"] == pytest.approx(loss, rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(published[name], parameter.detach(), atol=1e-5, rtol=1e-5, msg=name)
    total, count = _full_kl(student, teacher)
    kl, num_tokens = learner.held_out_kl(batch)
    assert kl == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert num_tokens == count
    learner.close()


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        (ObjectiveKind.support, {"zero_stage": 3, "num_ranks": 2, "max_tokens_per_micro_batch": 9}),
        (ObjectiveKind.sampled, {"zero_stage": 2, "num_ranks": 2, "max_tokens_per_micro_batch": 16}),
        (ObjectiveKind.sampled, {"zero_stage": 0, "num_ranks": 1, "max_tokens_per_micro_batch": 64}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.value,
)
@pytest.mark.usefixtures("cluster")
def test_masks_and_means_are_those_of_the_global_batch(
    config: Config, tmp_path: Path, kind: ObjectiveKind, cut: dict[str, int]
) -> None:
    config.learner = replace(config.learner, lr=1.0, engine_args={"optimizer": {"params": {"eps": _EPS}}}, **cut)
    config.objective = ObjectiveConfig(
        kind=kind,
        discount=0.5,
        ratio=RatioKind.none,  # the groups' sampled log-probs are made up
        mask=MaskConfig(tokens=["2"]),
        normalisation=Normalisation.sequence_mean,
    )
    student, teacher = reference_model(config.student.path), reference_model(config.teacher.path)
    learner = _open_learner(config, tmp_path)

    metrics = learner.update(_batch(teacher, kind))
    published = _published(learner)

    assert metrics["train/kept_token_fraction"] == pytest.approx(16 / 21)
    assert metrics["teacher/dropped_mass"] == pytest.approx(4 * 0.25 / 21)
    _plain_update(student, _masked_sequence_means(student, teacher, kind), lr=config.learner.lr)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(published[name], parameter.detach(), atol=1e-5, rtol=1e-5, msg=name)
    learner.close()


@pytest.mark.usefixtures("cluster")
def test_a_restored_learner_goes_on_as_the_one_that_saved(config: Config, tmp_path: Path) -> None:
    teacher = reference_model(config.teacher.path)
    batch = _batch(teacher)
    learner = _open_learner(config, tmp_path)
    learner.update(batch)
    (tmp_path / "checkpoint").mkdir()
    learner.save(str(tmp_path / "checkpoint"))
    learner.update(batch)
    expected = _published(learner)
    learner.close()

    resumed = _open_learner(config, tmp_path)
    resumed.restore(str(tmp_path / "checkpoint"))
    resumed.update(batch)
    for name, tensor in _published(resumed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=0, msg=name)
    resumed.export(str(tmp_path / "export"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    torch.testing.assert_close(exported["lm_head.weight"], expected["lm_head.weight"])
    resumed.close()
