from collections.abc import Callable
from dataclasses import MISSING, fields

import pytest
from config_files import compose_config, refusal

from opd_ray.config.data import DataConfig, DataKind
from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import (
    BatchConfig,
    Config,
    EvalConfig,
    LearnerConfig,
    RolloutConfig,
    StudentConfig,
    TaskConfig,
    TeacherConfig,
    TinyModelConfig,
)
from opd_ray.config.services import TrackingConfig, TrackingKind


def a_teacher(**given: object) -> TeacherConfig:
    return TeacherConfig(path="teacher", **given)


def some_data(**given: object) -> DataConfig:
    return DataConfig(kind=DataKind.task, **given)


def a_run(**given: object) -> Config:
    blocks = {
        "student": StudentConfig(path="student"),
        "teacher": a_teacher(),
        "data": some_data(),
        "objective": ObjectiveConfig(kind=ObjectiveKind.sampled),
        "tracking": TrackingConfig(kind=TrackingKind.none),
    }
    return Config(**{"name": "run", "num_steps": 1, **blocks, **given})


ANY_COUNT = "an integer of at least 1"
RULES: list[tuple[Callable[..., object], str, object, str]] = [
    *((TinyModelConfig, f"*.build.{n}", 0, ANY_COUNT) for n in ("num_layers", "hidden_size", "num_heads")),
    *((TinyModelConfig, f"*.build.{n}", 0, ANY_COUNT) for n in ("num_steps", "batch_size")),
    (a_teacher, "teacher.num_workers", 0, ANY_COUNT),
    (some_data, "data.num_prompts", 0, ANY_COUNT),
    (some_data, "data.max_prompt_tokens", 0, "an integer of at least 1"),
    (BatchConfig, "batch.num_prompts", 0, ANY_COUNT),
    (BatchConfig, "batch.max_bad_fraction", -0.1, "a number from 0 to 1"),
    (BatchConfig, "batch.max_bad_fraction", 1.5, "a number from 0 to 1"),
    (BatchConfig, "batch.max_bad_fraction", float("nan"), "a number from 0 to 1"),
    (RolloutConfig, "rollout.samples_per_prompt", 0, ANY_COUNT),
    (RolloutConfig, "rollout.max_response_tokens", 0, ANY_COUNT),
    (RolloutConfig, "rollout.num_workers", -1, ANY_COUNT),
    (RolloutConfig, "rollout.temperature", 0.0, "a number above 0"),
    (RolloutConfig, "rollout.temperature", float("nan"), "a number above 0"),
    (RolloutConfig, "rollout.top_p", 0.0, "a number in (0, 1]"),
    (RolloutConfig, "rollout.top_p", 1.5, "a number in (0, 1]"),
    (LearnerConfig, "learner.num_ranks", 0, ANY_COUNT),
    (LearnerConfig, "learner.zero_stage", 4, "0, 1, 2 or 3"),
    (LearnerConfig, "learner.lr", 0.0, "a number above 0"),
    (LearnerConfig, "learner.warmup_steps", -1, "an integer of at least 0"),
    (LearnerConfig, "learner.max_tokens_per_micro_batch", 0, ANY_COUNT),
    (TinyModelConfig, "*.build.tasks", [], "at least one built-in task"),
    (TaskConfig, "tasks.*.share", 0.0, "a number above 0"),
    (TaskConfig, "tasks.*.loss_weight", -0.5, "a number of at least 0"),
    (TaskConfig, "tasks.*.samples_per_prompt", 0, "an integer of at least 1, or null"),
    (TaskConfig, "tasks.*.max_response_tokens", 0, "an integer of at least 1, or null"),
    (TaskConfig, "tasks.*.top_p", 0.0, "a number in (0, 1], or null"),
    (TaskConfig, "tasks.*.top_p", 1.5, "a number in (0, 1], or null"),
    (EvalConfig, "eval.num_prompts", 0, ANY_COUNT),
    (EvalConfig, "eval.samples_per_prompt", 0, ANY_COUNT),
    (a_run, "num_steps", 0, ANY_COUNT),
    (a_run, "max_staleness", -1, "an integer of at least 0"),
    (a_run, "eval_every", -1, "an integer of at least 0"),
    (a_run, "save_every", -1, "an integer of at least 0"),
]


@pytest.mark.parametrize(("build", "key", "given", "expected"), RULES)
def test_a_value_outside_its_range_is_refused_by_key_value_and_expectation(
    build: Callable[..., object], key: str, given: object, expected: str
):
    words = refusal(lambda: build(**{key.rpartition(".")[2]: given}))
    assert words == f"{key}={given}: expected {expected}"


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (TinyModelConfig, "num_layers", 1),
        (BatchConfig, "max_bad_fraction", 0.0),
        (BatchConfig, "max_bad_fraction", 1.0),
        (RolloutConfig, "top_p", 1.0),
        (TaskConfig, "top_p", 1.0),
        (TaskConfig, "loss_weight", 0.0),
        (TaskConfig, "max_response_tokens", 1),
        *((TaskConfig, name, None) for name in ("verifier", "samples_per_prompt", "max_response_tokens", "top_p")),
        *((LearnerConfig, "zero_stage", stage) for stage in range(4)),
        (LearnerConfig, "warmup_steps", 0),
        (a_run, "num_steps", 1),
        (a_run, "max_staleness", 0),
    ],
)
def test_the_edge_of_a_range_is_taken(build: Callable[..., object], name: str, value: object):
    assert getattr(build(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "a\nb", "näme!"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str):
    words = refusal(lambda: a_run(name=name))
    assert words == f"name={name!r}: expected letters, digits, '.', '_' and '-', not starting with '.'"


@pytest.mark.parametrize("name", ["demo", "lr-1e-3_v1.2", "7"])
def test_a_plain_folder_name_is_taken(name: str):
    assert a_run(name=name).name == name


def test_two_runs_share_no_block():
    assert a_run().rollout.engine_args is not a_run().rollout.engine_args


def test_what_the_schema_calls_mandatory_is_what_a_command_line_must_give():
    mandatory = {f.name for f in fields(Config) if f.default is MISSING and f.default_factory is MISSING}
    assert mandatory == {"name", "num_steps", "student", "teacher", "data", "objective", "tracking"}


def test_no_yaml_group_but_the_cluster_and_the_experiment_overrides_a_default_of_the_schema():
    composed = compose_config(
        "name=run", "num_steps=1", "student.path=student", "teacher.path=teacher", "data.task=sort", "cluster=gpus"
    )
    assert composed.rollout == RolloutConfig(gpus_per_worker=1)
    assert composed.learner == LearnerConfig(gpus_per_rank=1)
    assert composed.objective == ObjectiveConfig(kind=ObjectiveKind.support)
    assert composed.eval == EvalConfig()
