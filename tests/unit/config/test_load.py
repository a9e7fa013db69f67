from enum import Enum

import pytest
import yaml
from config_files import CONFIG_DIR, MANDATORY, compose_config, compose_raw, refusal
from omegaconf import OmegaConf

from opd_ray.config.data import DataKind
from opd_ray.config.load import load, register_schema
from opd_ray.config.objective import ObjectiveKind
from opd_ray.config.schema import Config, Dtype, TaskConfig, TeacherConfig, TinyModelConfig
from opd_ray.config.services import TrackingKind

CHOICES = [
    (group.name, choice.stem)
    for group in sorted(CONFIG_DIR.iterdir())
    if group.is_dir() and group.name != "experiment"
    for choice in sorted(group.glob("*.yaml"))
]
EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


def test_the_defaults_compose_with_the_mandatory_keys_alone():
    config = compose_config(*MANDATORY)
    assert (config.name, config.num_steps, config.student.path, config.teacher.path) == ("run", 3, "student", "teacher")
    assert config.data.kind is DataKind.task
    assert config.objective.kind is ObjectiveKind.support
    assert config.tracking.kind is TrackingKind.wandb


def test_the_demo_composes_and_holds_together():
    config = compose_config("experiment=demo")
    assert config.name == "demo"
    assert config.objective.kind is ObjectiveKind.full
    assert config.learner.num_ranks == 2
    assert config.rollout.dtype is Dtype.float32
    assert isinstance(config.teacher.build, TinyModelConfig)


def test_the_demo_of_two_teachers_composes_and_holds_together():
    config = compose_config("experiment=demo_multi")
    assert (config.name, config.data.task, config.data.tasks) == ("demo_multi", None, ["sort", "copy"])
    assert list(config.teachers) == ["sort", "copy"]
    for task, teacher in config.teachers.items():
        assert type(teacher) is TeacherConfig
        assert teacher.build.tasks == [task]
        assert (teacher.dtype, teacher.engine_args) == (Dtype.float32, config.rollout.engine_args)
    assert config.teachers["sort"].path != config.teachers["copy"].path
    assert config.student.build.tasks == ["sort", "copy"]


def test_the_demo_of_two_teachers_takes_the_sorting_one_from_the_demo():
    one, two = compose_config("experiment=demo"), compose_config("experiment=demo_multi")
    assert (two.teachers["sort"].path, two.teachers["sort"].build) == (one.teacher.path, one.teacher.build)
    assert two.student.path != one.student.path


def test_entries_by_task_are_given_whole_and_may_then_be_changed_key_by_key():
    config = compose_config(
        *MANDATORY, "+teachers={sort: {path: a}}", "teachers.sort.num_workers=2", "+tasks={sort: {share: 3}}"
    )
    assert config.teachers == {"sort": TeacherConfig(path="a", num_workers=2)}
    assert config.tasks == {"sort": TaskConfig(share=3.0)}


def test_a_teacher_of_a_task_needs_a_path():
    words = refusal(lambda: compose_config(*MANDATORY, "+teachers={sort: {num_workers: 2}}"))
    assert words.startswith("teachers.sort.path is not given")


def test_with_a_teacher_for_each_task_the_default_one_needs_no_path():
    given = [override for override in MANDATORY if not override.startswith("teacher.path=")]
    config = compose_config(*given, "+teachers={sort: {path: a, num_workers: 2}}", "teacher.num_workers=3")
    assert (config.teacher.path, config.teacher.num_workers) == ("", 3)
    assert config.teachers == {"sort": TeacherConfig(path="a", num_workers=2)}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_holds_together(experiment: str):
    assert isinstance(compose_config(f"experiment={experiment}", "data.path=prompts"), Config)


NEEDED = {
    ("teacher", "http"): ['teacher.http.urls=["http://127.0.0.1:9"]'],
    ("teacher", "cache"): ["teacher.cache.path=scores"],
    ("teacher", "self"): ["teacher.path=student"],
    ("data", "reasoning_gym"): ["data.task=chain_sum"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group: str, choice: str):
    config = compose_config(*MANDATORY, f"{group}={choice}", "data.path=prompts", *NEEDED.get((group, choice), []))
    assert isinstance(config, Config)


def test_an_override_goes_before_the_experiment_and_the_experiment_before_the_groups():
    assert compose_config("experiment=demo").batch.num_prompts == 64
    assert compose_config("experiment=demo", "batch.num_prompts=8").batch.num_prompts == 8
    assert compose_config("experiment=demo", "objective=sampled").objective.kind is ObjectiveKind.sampled


@pytest.mark.parametrize("missing", ["name", "num_steps", "student.path", "teacher.path"])
def test_a_mandatory_key_that_is_not_given_is_named(missing: str):
    given = [override for override in MANDATORY if not override.startswith(f"{missing}=")]
    words = refusal(lambda: compose_config(*given))
    assert words.startswith(f"{missing} is not given")
    assert "\n" not in words


def test_all_mandatory_keys_that_are_not_given_are_listed():
    words = refusal(lambda: compose_config("data.task=sort"))
    assert words.startswith("name is not given")
    assert "(missing: name, num_steps, student.path, teacher.path)" in words


def test_an_interpolation_is_resolved():
    config = compose_config("experiment=demo", "runs_dir=out/${name}", "data.path=${runs_dir}/x")
    assert config.runs_dir == "out/demo"
    assert config.data.path == "out/demo/x"
    assert config.teacher.build.tasks == [config.data.task] == ["sort"]


def test_an_interpolation_of_an_unknown_key_is_refused_in_one_line_that_names_the_key():
    words = refusal(lambda: compose_config(*MANDATORY, "runs_dir=${nmae}"))
    assert words.startswith("runs_dir: ")
    assert "nmae" in words
    assert "\n" not in words


def test_a_rule_of_one_field_and_a_rule_of_several_are_both_checked_on_loading():
    assert refusal(lambda: compose_config(*MANDATORY, "learner.zero_stage=7")).startswith("learner.zero_stage=7")
    assert refusal(lambda: compose_config(*MANDATORY, "data.max_prompt_tokens=9999")).startswith("learner.max_tokens_")


def test_engine_arguments_pass_through_untouched():
    config = compose_config(*MANDATORY, "+learner.engine_args.zero_optimization.overlap_comm=true")
    assert config.learner.engine_args == {"zero_optimization": {"overlap_comm": True}}


def test_the_loaded_configuration_holds_dataclasses_and_enumerations_and_nothing_of_omegaconf():
    config = compose_config("experiment=demo")
    assert type(config.rollout.engine_args) is dict
    assert isinstance(config.resume, Enum)


def test_a_configuration_written_out_and_read_again_is_the_same():
    config = compose_config("experiment=demo")
    written = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert yaml.safe_load(written)["learner"]["lr"] == config.learner.lr
    again = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(written))
    assert OmegaConf.to_object(again) == config


def test_registering_the_schema_twice_does_no_harm():
    register_schema()
    assert isinstance(load(compose_raw("experiment=demo")), Config)
