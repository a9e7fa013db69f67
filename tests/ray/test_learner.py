"""The learner's DeepSpeed ranks on a real Ray cluster, against one plain torch update."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from helpers import compose_config, reference_logprobs, reference_model, sampled
from learners import (
    EPS,
    GROUPS,
    MASKED_IDS,
    TOP_K,
    full_kl,
    make_batch,
    open_learner,
    plain_optimizer,
    plain_update,
    published_weights,
    summary_of,
    token_means,
)
from transformers import AutoModelForCausalLM

from opd_ray.config.objective import MaskConfig, Normalisation, ObjectiveConfig, ObjectiveKind, RatioKind
from opd_ray.config.schema import Config
from opd_ray.protocol import TrajectoryGroup
from workers import connected
from workers.learner.fleet import rank_batches

pytestmark = pytest.mark.ray


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def _masked_sequence_means(student: Any, teacher: Any, kind: ObjectiveKind) -> torch.Tensor:
    """Return the mean over trajectories of the mean loss of their tokens, the masked ids left out of everything."""
    means = []
    for group in GROUPS:
        log_p, log_q = reference_logprobs(student, group), reference_logprobs(teacher, group).detach()
        kept = torch.tensor([token not in MASKED_IDS for token in group.response_ids])
        if kind is ObjectiveKind.support:
            q_NK, ids_NK = log_q.topk(TOP_K)
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
        _slow(True, {"zero_stage": 3, "num_ranks": 2, "max_tokens_per_micro_batch": 64}),
        (False, {"zero_stage": 2, "num_ranks": 1, "max_tokens_per_micro_batch": 10}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else f"tied={value}",
)
@pytest.mark.usefixtures("cluster")
def test_one_update_is_the_plain_torch_update_however_it_is_cut(
    config: Config, tmp_path: Path, model_folder: Any, tied: bool, cut: dict[str, int]
) -> None:
    config.student.path = model_folder(seed=1, tied=tied)
    config.learner = replace(config.learner, lr=1.0, engine_args={"optimizer": {"params": {"eps": EPS}}}, **cut)
    student, teacher = reference_model(config.student.path), reference_model(config.teacher.path)
    learner = open_learner(config, tmp_path)
    batch = make_batch(teacher)

    metrics = learner.update(batch)
    published = published_weights(learner)

    total, count = full_kl(student, teacher)
    loss, grad_norm = plain_update(plain_optimizer(student, lr=config.learner.lr), total / count)
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["train/grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    assert metrics["distill/reverse_kl_full"] == pytest.approx(loss, rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(published[name], parameter.detach(), atol=1e-5, rtol=1e-5, msg=name)
    total, count = full_kl(student, teacher)
    compared = learner.compare(batch)
    assert compared.kl == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert compared.num_tokens == count
    assert len(compared.points.ids_M) == count
    means = compared.metrics()
    found = means["student_entropy"], means["teacher_entropy"], float(compared.points.rewards_M.mean())
    assert found == pytest.approx(token_means(student, teacher), rel=1e-3)
    learner.close()


def expected_noise(student: Any, teacher: Any, *, num_ranks: int, max_tokens: int) -> float:
    """Return the variance of the micro-batches' gradients, each scaled to estimate the mean's, over its square."""
    cuts = rank_batches(
        [summary_of(group) for group in GROUPS],
        teachers=["teacher"] * len(GROUPS),
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        padded=False,
        hidden_size=64,
        version=0,
    )
    parameters, gradients = list(student.parameters()), []
    num_tokens = sum(len(group.response_ids) for group in GROUPS)
    for share, of_rank in cuts:
        losses = [loss for i in share for loss in sequence_kls(student, teacher, GROUPS[i])]
        for micro_batch in filter(None, of_rank.micro_batches):
            loss = torch.stack([losses[i] for i in micro_batch]).sum() / num_tokens
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients.append(torch.cat([part.flatten() for part in parts]).double())
    assert len(gradients) > 3
    estimates = torch.stack(gradients) * len(gradients)
    return float(estimates.var(dim=0).sum() / estimates.mean(dim=0).square().sum())


def sequence_kls(student: Any, teacher: Any, group: TrajectoryGroup) -> list[torch.Tensor]:
    """Return the sum of KL(student || teacher) over the tokens of each response."""
    log_p, log_q = reference_logprobs(student, group), reference_logprobs(teacher, group).detach()
    kl_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    return [kl_N[start:end].sum() for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True)]


@pytest.mark.parametrize(
    "cut",
    [(2, 1), *(_slow((stage, 2)) for stage in (0, 2, 3))],
    ids=lambda cut: f"zero{cut[0]}-ranks{cut[1]}",
)
@pytest.mark.usefixtures("cluster")
def test_gradient_noise_is_the_variance_over_micro_batches(
    config: Config, tmp_path: Path, model_folder: Any, cut: tuple[int, int]
) -> None:
    zero_stage, num_ranks = cut
    config.student.path = model_folder(seed=1, tied=zero_stage == 2)
    config.learner = replace(
        config.learner, gradient_noise=True, zero_stage=zero_stage, num_ranks=num_ranks, max_tokens_per_micro_batch=9
    )
    student, teacher = reference_model(config.student.path), reference_model(config.teacher.path)
    learner = open_learner(config, tmp_path)
    metrics = learner.update(make_batch(teacher))
    expected = expected_noise(student, teacher, num_ranks=num_ranks, max_tokens=9)
    assert metrics["train/gradient_noise"] == pytest.approx(expected, rel=1e-3)
    learner.close()


@pytest.mark.parametrize("cut", [_slow((0, 1)), (2, 2), _slow((3, 2))], ids=lambda cut: f"zero{cut[0]}-ranks{cut[1]}")
@pytest.mark.usefixtures("cluster")
def test_the_norm_of_each_tasks_gradient_is_that_of_its_own_loss(
    config: Config, tmp_path: Path, cut: tuple[int, int]
) -> None:
    zero_stage, num_ranks = cut
    config.learner = replace(config.learner, gradient_noise=True, zero_stage=zero_stage, num_ranks=num_ranks)
    student, teacher = reference_model(config.student.path), reference_model(config.teacher.path)
    batch, tasks = make_batch(teacher), ("sort", "copy", "copy", "sort")
    handles = [
        replace(
            handle,
            summary=ray.put(replace(summary_of(group), task=task)),
            group=ray.put(replace(group, task=task)),
        )
        for handle, group, task in zip(batch.groups, GROUPS, tasks, strict=True)
    ]
    learner = open_learner(config, tmp_path)
    metrics = learner.update(replace(batch, groups=handles))
    learner.close()

    num_tokens = sum(len(group.response_ids) for group in GROUPS)
    for task in ("sort", "copy"):
        own = [group for group, of_group in zip(GROUPS, tasks, strict=True) if of_group == task]
        kl = torch.stack([kl for group in own for kl in sequence_kls(student, teacher, group)]).sum()
        parts = torch.autograd.grad(kl / num_tokens, list(student.parameters()))
        exact = float(torch.cat([part.flatten() for part in parts]).norm())
        assert metrics[f"train/grad_norm_{task}"] == pytest.approx(exact, rel=0.06)  # five standard deviations
    assert metrics["train/grad_norm_sort"] != pytest.approx(metrics["train/grad_norm_copy"], rel=0.1)
    assert "train/grad_norm_exact" not in metrics


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        (ObjectiveKind.support, {"zero_stage": 3, "num_ranks": 2, "max_tokens_per_micro_batch": 9}),
        (ObjectiveKind.sampled, {"zero_stage": 2, "num_ranks": 2, "max_tokens_per_micro_batch": 16}),
        _slow(ObjectiveKind.sampled, {"zero_stage": 0, "num_ranks": 1, "max_tokens_per_micro_batch": 64}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.value,
)
@pytest.mark.usefixtures("cluster")
def test_masks_and_means_are_those_of_the_global_batch(
    config: Config, tmp_path: Path, kind: ObjectiveKind, cut: dict[str, int]
) -> None:
    config.learner = replace(config.learner, lr=1.0, engine_args={"optimizer": {"params": {"eps": EPS}}}, **cut)
    config.objective = ObjectiveConfig(
        kind=kind,
        discount=0.5,
        ratio=RatioKind.none,  # the groups' sampled log-probs are made up
        mask=MaskConfig(tokens=["2"]),
        normalisation=Normalisation.sequence_mean,
    )
    student, teacher = reference_model(config.student.path), reference_model(config.teacher.path)
    learner = open_learner(config, tmp_path)

    metrics = learner.update(make_batch(teacher, kind))
    published = published_weights(learner)

    assert metrics["train/kept_token_fraction"] == pytest.approx(16 / 21)
    assert metrics["teacher/dropped_mass"] == pytest.approx(4 * 0.25 / 21)
    plain_update(plain_optimizer(student, lr=config.learner.lr), _masked_sequence_means(student, teacher, kind))
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(published[name], parameter.detach(), atol=1e-5, rtol=1e-5, msg=name)
    learner.close()


@pytest.mark.usefixtures("cluster")
def test_a_restored_learner_goes_on_as_the_one_that_saved(config: Config, tmp_path: Path) -> None:
    teacher = reference_model(config.teacher.path)
    batch = make_batch(teacher)
    learner = open_learner(config, tmp_path)
    learner.update(batch)
    (tmp_path / "checkpoint").mkdir()
    learner.save(str(tmp_path / "checkpoint"))
    learner.update(batch)
    expected = published_weights(learner)
    learner.close()

    resumed = open_learner(config, tmp_path)
    resumed.restore(str(tmp_path / "checkpoint"))
    resumed.update(batch)
    for name, tensor in published_weights(resumed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=0, msg=name)
    resumed.export(str(tmp_path / "export"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    torch.testing.assert_close(exported["lm_head.weight"], expected["lm_head.weight"])
    resumed.close()
