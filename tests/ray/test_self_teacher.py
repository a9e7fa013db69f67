"""The student as its own teacher, and privileged context, on real engines: as plain objects, then in whole runs."""

import asyncio
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import make_group, read_lines, reference_logprobs, reference_model, run_train, sampled

from opd_ray.config.schema import Dtype, TeacherConfig
from opd_ray.config.teacher import SelfTeacherConfig, SelfUpdate, TeacherKind
from opd_ray.protocol import Float32, HiddenScore, Payload, SampledScore, ScoreRequest, TrajectoryGroup
from workers.output_head import load_head
from workers.teacher.actor import TeacherActor
from workers.weights import published

pytestmark = pytest.mark.ray

_ENGINE_ARGS = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
_SAMPLED, _HIDDEN = ScoreRequest(payload=Payload.sampled), ScoreRequest(payload=Payload.hidden)
_GROUP = make_group([1, 10, 2, 11], [1, 2, 12], [3, 3], [1, 2, 5, 4])
_PRIVILEGED = replace(_GROUP, teacher_prompt_ids=np.array([7, 10, 9, 10, 1, 10, 2, 11], dtype=np.int32))

Overrides = Callable[..., list[str]]


def _actor(folder: str, **options: Any) -> TeacherActor:
    return TeacherActor(
        config=TeacherConfig(path=folder, dtype=Dtype.float32, engine_args=_ENGINE_ARGS, **options),
        request=_SAMPLED,
        student_path=folder,
        max_model_tokens=32,
        vocab_size=30,
        temperature=1.0,
        equivalent_ids=(),
    )


def _ema(folder: str, *, decay: float) -> TeacherActor:
    return _actor(folder, kind=TeacherKind.self, self=SelfTeacherConfig(update=SelfUpdate.ema, ema_decay=decay))


async def _sampled(actor: TeacherActor, group: TrajectoryGroup) -> Float32:
    _, score = await actor.score(group, _SAMPLED)
    assert isinstance(score, SampledScore)
    return score.logprobs_N


def _truth_NV(model: torch.nn.Module, group: TrajectoryGroup, *, prompt_ids: npt.NDArray[np.int32]) -> torch.Tensor:
    """Return log-probs over the common vocabulary of the tokens behind a prompt, from plain transformers."""
    logprobs_NV = reference_logprobs(model, replace(group, prompt_ids=prompt_ids)).detach()
    return logprobs_NV[:, :30].log_softmax(-1)


def _mean(first: torch.nn.Module, second: torch.nn.Module) -> torch.nn.Module:
    """Return the model whose every weight is the mean of two models'."""
    model = deepcopy(first)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), second.parameters(), strict=True):
            mine.add_(other).div_(2)
    return model


@pytest.mark.parametrize("kind", [TeacherKind.vllm, TeacherKind.self])
def test_scores_under_a_privileged_context_are_those_behind_the_teachers_prompt(
    model_folder: Any, kind: TeacherKind
) -> None:
    folder = model_folder(seed=2)
    truth_NV = _truth_NV(reference_model(folder), _GROUP, prompt_ids=_PRIVILEGED.teacher_prompt_ids)

    async def scenario() -> None:
        actor = _actor(folder, kind=kind)
        np.testing.assert_allclose(await _sampled(actor, _PRIVILEGED), sampled(truth_NV, _GROUP).numpy(), atol=1e-5)
        summary, hidden = await actor.score(_PRIVILEGED, _HIDDEN)
        assert isinstance(hidden, HiddenScore)
        assert summary.num_tokens == len(hidden.hidden_ND) == len(_GROUP.response_ids)
        logits = torch.from_numpy(hidden.hidden_ND) @ load_head(folder, vocab_size=30).T
        np.testing.assert_allclose(logits.log_softmax(-1).numpy(), truth_NV.numpy(), atol=1e-5)
        unprivileged_NV = _truth_NV(reference_model(folder), _GROUP, prompt_ids=_GROUP.prompt_ids)
        np.testing.assert_allclose(await _sampled(actor, _GROUP), sampled(unprivileged_NV, _GROUP).numpy(), atol=1e-5)
        assert np.abs(sampled(truth_NV, _GROUP) - sampled(unprivileged_NV, _GROUP)).max() > 0.1

    asyncio.run(scenario())


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_an_average_scores_as_the_model_of_averaged_weights_does(model_folder: Any, tmp_path: Path, tied: bool) -> None:
    folders = [model_folder(seed=seed, tied=tied) for seed in (1, 2)]
    before, after = map(reference_model, folders)
    path = str(tmp_path / "teacher.safetensors")

    def truth(model: torch.nn.Module) -> Any:
        return sampled(_truth_NV(model, _GROUP, prompt_ids=_GROUP.prompt_ids), _GROUP).numpy()

    assert np.abs(truth(_mean(before, after)) - truth(after)).max() > 0.1

    async def scenario() -> None:
        half = _ema(folders[0], decay=0.5)
        np.testing.assert_allclose(await _sampled(half, _GROUP), truth(before), atol=1e-5)
        await half.follow(*published(before.named_parameters(), version=0))
        np.testing.assert_allclose(await _sampled(half, _GROUP), truth(before), atol=1e-5)
        await half.follow(*published(after.named_parameters(), version=1))
        np.testing.assert_allclose(await _sampled(half, _GROUP), truth(_mean(before, after)), atol=1e-4)
        await half.save(path)

        current = _ema(folders[0], decay=0.0)
        await current.follow(*published(before.named_parameters(), version=0))
        await current.follow(*published(after.named_parameters(), version=1))
        np.testing.assert_allclose(await _sampled(current, _GROUP), truth(after), atol=1e-5)
        await current.restore(path)
        np.testing.assert_allclose(await _sampled(current, _GROUP), truth(_mean(before, after)), atol=1e-4)

    asyncio.run(scenario())


@pytest.fixture
def own(overrides: Overrides) -> Overrides:
    """Return a function that gives the overrides of a run whose teacher is the student."""

    def build(*more: str) -> list[str]:
        given = [o for o in overrides() if not o.startswith("teacher.path")]
        return [*given, "teacher=self", *more]

    return build


@pytest.mark.slow
def test_the_frozen_student_as_teacher_gives_kl_zero_at_the_start_and_says_that_there_is_nothing_to_learn(
    own: Overrides, tmp_path: Path
) -> None:
    summary, _ = run_train(own("num_steps=1", "learner.lr=1e-9"))
    assert summary["reverse_kl_before"] < 1e-4
    assert summary["reverse_kl_after"] < 1e-4
    assert "without teacher.context" in (tmp_path / "runs" / "test" / "events.jsonl").read_text()


# AdamW's weight decay moves the student by a tenth an update, where a teacher that agrees with it gives no gradient.
_MOVED = ("objective=sampled", "learner.weight_decay=10", "learner.lr=0.01", "eval_every=1")


@pytest.mark.slow
def test_a_teacher_that_is_always_the_current_student_agrees_with_it_while_the_student_moves(
    own: Overrides, tmp_path: Path, model_folder: Any
) -> None:
    run_train(own(*_MOVED, "teacher.self.update=ema", "teacher.self.ema_decay=0"))
    run_dir = tmp_path / "runs" / "test"
    for metrics in read_lines(run_dir / "metrics.jsonl"):
        assert abs(metrics["eval/reverse_kl"]) < 1e-4
    assert all(metrics["time/teacher_load_s"] > 0 for metrics in read_lines(run_dir / "metrics.jsonl")[1:])
    moved = load_head(str(run_dir / "export"), vocab_size=30) / load_head(model_folder(seed=1), vocab_size=30)
    assert float(moved.median()) == pytest.approx(0.9**2, abs=0.02)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_average_of_its_checkpoint(own: Overrides, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "test"
    run = own(*_MOVED, "num_steps=3", "save_every=2", "teacher.self.update=ema", "teacher.self.ema_decay=0.5")
    run_train(run)
    whole = read_lines(run_dir / "metrics.jsonl")
    assert abs(whole[3]["eval/reverse_kl"]) > 1e-2  # unlike a teacher that starts anew from the current student
    shutil.rmtree(run_dir / "checkpoints" / "step-000003", ignore_errors=True)
    run_train([*run, "resume=auto"])
    resumed = read_lines(run_dir / "metrics.jsonl")
    assert resumed[:3] == whole[:3]
    for name in ("eval/reverse_kl", "distill/reverse_kl_sampled"):
        assert resumed[3][name] == pytest.approx(whole[3][name], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_student_learns_from_itself_with_the_answer_in_sight(own: Overrides, tmp_path: Path) -> None:
    summary, _ = run_train(
        own(
            f"student.path={tmp_path}/student",
            "student=tiny",
            "student.build.num_steps=60",
            "teacher.context='{answer}+{prompt}'",
            "num_steps=40",
            "batch.num_prompts=16",
            "learner.lr=3e-4",  # more throws a trained model off at the first update
            "learner.warmup_steps=5",
        )
    )
    assert summary["reverse_kl_after"] < 0.5 * summary["reverse_kl_before"]
