"""Offline distillation on the real stack: a run records its groups and scores, another one trains on the recording."""

import asyncio
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from fakes import make_request
from helpers import compose_config, make_group, read_lines, run_train

import workers
from opd_ray.config.schema import Config
from opd_ray.config.teacher import CacheTeacherConfig
from opd_ray.controller import Fleets
from opd_ray.data.models import inspect_models
from opd_ray.doctor import examine
from opd_ray.preflight import Status
from opd_ray.protocol import (
    RECORDED_VERSION,
    Batch,
    GroupHandle,
    GroupSummary,
    Learner,
    Metrics,
    SampledScore,
    ScoreHandle,
    ScoreSummary,
    TrajectoryGroup,
)
from opd_ray.replay import prepare_recording
from opd_ray.requests import ObjectiveIds, score_request
from opd_ray.scores import read_recording
from workers.scores import training_fleets
from workers.teacher.errors import BadScore
from workers.teacher.recorded import RecordedTeacher

pytestmark = pytest.mark.ray

Overrides = Callable[..., list[str]]


def _offline(overrides: Overrides, tmp_path: Path, *more: str) -> list[str]:
    """Return the overrides of a run on the recording of the run `test`."""
    return overrides("name=offline", "teacher=cache", f"teacher.cache.path={tmp_path}/runs/test/scores", *more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        ["objective=full"],
        ["objective=support", "objective.support=student", "objective.top_k=8", "max_staleness=1"],
    ],
    ids=lambda objective: " ".join(objective),
)
def test_a_run_on_recorded_scores_repeats_the_run_that_recorded_them(
    overrides: Overrides, tmp_path: Path, objective: list[str]
) -> None:
    recorded, _ = run_train(overrides("num_steps=3", "record_scores=true", *objective))
    replayed, screen = run_train(_offline(overrides, tmp_path, "num_steps=3", *objective))
    first, second = (read_lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("test", "offline"))
    assert [m["step"] for m in second] == [0, 1, 2, 3]
    for live, offline in zip(first[1:], second[1:], strict=True):
        # The same student on the same responses and scores: not the first update alone is the same.
        assert offline["train/loss"] == pytest.approx(live["train/loss"], abs=1e-5)
        assert offline["rollout/response_tokens"] == live["rollout/response_tokens"]
        assert offline["rollout/accuracy"] == live["rollout/accuracy"]
        assert offline["teacher/bytes_per_token"] == live["teacher/bytes_per_token"]
        assert "rollout/logprob_gap_max" not in offline
        assert "rollout/logprob_gap_stale_max" not in offline
        assert "train/token_age_mean" not in offline
    if objective == ["objective=full"]:
        assert second[1]["rollout/logprob_gap_recorded_max"] < 1e-4  # the student that sampled, so far
    assert replayed["student_accuracy_after"] == recorded["student_accuracy_after"]
    assert not any("reverse_kl" in name for name in replayed if not name.startswith("distill"))
    assert "reverse_kl_after" in recorded
    assert "not measured" in screen
    assert "recorded in" in screen
    assert list((tmp_path / "runs" / "offline" / "export").glob("*.safetensors"))
    assert not (tmp_path / "runs" / "offline" / "scores").exists()


@pytest.mark.slow
def test_a_resumed_recording_goes_on_and_a_longer_run_goes_through_it_again(
    overrides: Overrides, tmp_path: Path
) -> None:
    more = ["objective=sampled", "record_scores=true", "save_every=2"]
    run_train(overrides(*more))
    run_train(overrides(*more, "num_steps=3", "resume=auto"))
    recording = read_recording(tmp_path / "runs" / "test" / "scores")
    assert [group.step for group in recording.groups] == [0] * 4 + [1] * 4 + [2] * 4
    run_train(_offline(overrides, tmp_path, "objective=sampled", "num_steps=4", "batch.num_prompts=6", "seed=1"))
    steps = read_lines(tmp_path / "runs" / "offline" / "metrics.jsonl")[1:]
    assert len(steps) == 4
    assert all(m["train/ratio_mean"] > 0 for m in steps)
    assert all(m["rollout/logprob_gap_recorded_max"] >= 0 for m in steps)
    config = compose_config(_offline(overrides, tmp_path, "name=other", "objective=sampled"))
    findings = {finding.name: finding for finding in examine(config, engines=True)}
    assert findings["OPD signal"].found.startswith("not measured")
    assert findings["student as teacher"].status is Status.ok
    assert not [f for f in findings.values() if f.status is Status.error]


_GROUPS = [make_group([1, 2, 3], [4, 5], [6, 7, 8, 9]), make_group([3], [1], [2, 2])]


def _handle(group: TrajectoryGroup) -> GroupHandle:
    lengths = tuple(np.diff(group.offsets).tolist())
    summary = GroupSummary(
        prompt_index=0,
        task=group.task,
        num_prompt_tokens=len(group.prompt_ids),
        response_lengths=lengths,
        num_loss_tokens=sum(lengths),
        num_truncated=0,
        rewards=(),
        oldest_version=0,
        text="",
        generate_s=0.0,
    )
    return GroupHandle(
        request=make_request(group.prompt_index, task=group.task), summary=ray.put(summary), group=ray.put(group)
    )


class _Learner:
    """Learns nothing."""

    num_updates = 0

    def update(self, batch: Batch) -> Metrics:  # noqa: ARG002
        self.num_updates += 1
        return {"train/loss": 0.5}


@contextmanager
def _recorded(config: Config, learner: Any, *, tmp_path: Path, faults: list[str]) -> Iterator[Learner]:
    """Yield the learner as the loop sees it in a run that records."""
    models = inspect_models(student_path=config.student.path, teachers={"teacher.path": config.teacher})
    prepare_recording(config, tmp_path / "scores", models=models, ids=ObjectiveIds(masked=(), equivalent=()), step=0)
    nobody: Any = None
    with training_fleets(
        config,
        Fleets(rollout=nobody, teacher=nobody, learner=learner),
        folder=tmp_path / "scores",
        log_dir=tmp_path / "logs",
        on_fault=faults.append,
    ) as fleets:
        yield fleets.learner


@pytest.mark.parametrize("objective", ["objective=support", pytest.param("objective=full", marks=pytest.mark.slow)])
def test_a_recorded_score_is_served_as_the_teacher_gave_it_bit_for_bit(
    overrides: Overrides, tmp_path: Path, objective: str
) -> None:
    config = compose_config(overrides(objective, "objective.top_k=4", "record_scores=true"))
    asked, faults = score_request(config.objective), list[str]()
    with (
        workers.connected(config),
        workers.teacher_scorer(
            config, config.teacher, log_dir=tmp_path / "logs", role="teacher", vocab_size=32, temperature=1.0
        ) as teacher,
        _recorded(config, _Learner(), tmp_path=tmp_path, faults=faults) as learner,
    ):
        handles = [_handle(group) for group in _GROUPS]
        scores = teacher.score(handles, asked)
        assert learner.update(Batch(step=0, groups=handles, scores=scores)) == {"train/loss": 0.5}
        given = pickle.loads(pickle.dumps(ray.get([s.score for s in scores])))  # noqa: S301 - outlives the object store
    assert faults == []
    recorded = RecordedTeacher(CacheTeacherConfig(path=str(tmp_path / "scores")))
    for group, live_score in zip(_GROUPS, given, strict=True):
        as_replayed = replace(group, token_versions=np.full_like(group.token_versions, RECORDED_VERSION))
        summary, score = asyncio.run(recorded.score(as_replayed, asked))
        assert type(score) is type(live_score)
        assert summary.num_tokens == len(group.response_ids)
        for field in fields(score):
            served, live_array = getattr(score, field.name), getattr(live_score, field.name)
            assert served.dtype == live_array.dtype
            np.testing.assert_array_equal(served, live_array, strict=True)
    with pytest.raises(BadScore, match="was not recorded"):
        asyncio.run(recorded.score(make_group([1, 2, 3], [4, 6], [6, 7, 8, 9]), asked))


def test_a_folder_that_can_be_written_no_longer_ends_the_recording_and_not_the_run(
    overrides: Overrides, tmp_path: Path
) -> None:
    config = compose_config(overrides("objective=sampled", "record_scores=true"))
    faults, trained = list[str](), _Learner()
    with workers.connected(config), _recorded(config, trained, tmp_path=tmp_path, faults=faults) as learner:
        score = ray.put(SampledScore(logprobs_N=np.zeros(3, dtype=np.float32)))
        summary = ray.put(ScoreSummary(num_tokens=3, num_bytes=12, dropped_mass_sum=0.0, score_s=0.0))
        handle = ScoreHandle(teacher="teacher", summary=summary, score=score)
        for step in range(8):
            if step == 4:
                (tmp_path / "scores").rename(tmp_path / "elsewhere")
            learner.update(Batch(step=step, groups=[_handle(_GROUPS[1])], scores=[handle]))
    assert trained.num_updates == 8
    assert len(faults) == 1
    assert "No such file" in faults[0]
