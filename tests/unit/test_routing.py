from dataclasses import replace

import pytest
from config_files import MANDATORY, compose_config, refusal

from opd_ray.config.schema import Config, TaskConfig, TeacherConfig
from opd_ray.requests import held_out_samples, training_samples
from opd_ray.routing import (
    DEFAULT_TEACHER,
    Teachers,
    check_tasks,
    context_of,
    max_response_tokens,
    task_config,
    teacher_key,
    teachers_of,
    verifier_name,
)

A, B = TeacherConfig(path="a"), TeacherConfig(path="b")


def config_with(
    *overrides: str, teachers: dict[str, TeacherConfig] | None = None, tasks: dict[str, TaskConfig] | None = None
) -> Config:
    return replace(compose_config(*MANDATORY, *overrides), teachers=teachers or {}, tasks=tasks or {})


def test_without_teachers_by_task_the_one_teacher_teaches_every_task():
    config = config_with()
    teachers = teachers_of(config)
    assert teachers == Teachers(by_name={DEFAULT_TEACHER: config.teacher}, of_task={})
    assert teachers.name_of("sort") == teachers.name_of("anything") == DEFAULT_TEACHER
    assert teachers.tasks_of(DEFAULT_TEACHER) == []


def test_teachers_are_named_by_their_tasks_and_the_one_teacher_is_none_of_them():
    teachers = teachers_of(config_with(teachers={"sort": A, "copy": B}))
    assert teachers == Teachers(by_name={"sort": A, "copy": B}, of_task={"sort": "sort", "copy": "copy"})
    assert [teachers.name_of(task) for task in ("copy", "sort")] == ["copy", "sort"]


def test_tasks_with_equal_teachers_share_one_that_has_the_name_of_the_first():
    again = TeacherConfig(path="a")
    teachers = teachers_of(config_with(teachers={"sort": A, "copy": B, "exact": again}))
    assert teachers.by_name == {"sort": A, "copy": B}
    assert teachers.of_task == {"sort": "sort", "copy": "copy", "exact": "sort"}
    assert teachers.tasks_of("sort") == ["sort", "exact"]
    assert teachers.tasks_of("copy") == ["copy"]


@pytest.mark.parametrize("given", [{"num_workers": 2}, {"engine_args": {"max_num_seqs": 4}}, {"path": "c"}])
def test_teachers_that_differ_in_anything_are_two(given: dict[str, object]):
    teachers = teachers_of(config_with(teachers={"sort": A, "copy": replace(A, **given)}))
    assert list(teachers.by_name) == ["sort", "copy"]


def test_a_task_without_a_teacher_is_a_fault_where_teachers_are_given_by_task():
    with pytest.raises(KeyError):
        teachers_of(config_with(teachers={"sort": A})).name_of("copy")


def test_the_key_of_a_teachers_path_is_that_of_the_configuration():
    assert teacher_key(DEFAULT_TEACHER) == "teacher.path"
    assert teacher_key("sort") == "teachers.sort.path"


def test_prompts_of_a_task_without_a_teacher_are_refused_with_the_key_to_add():
    config = config_with(teachers={"sort": A, "exact": B})
    assert refusal(lambda: check_tasks(config, ["sort", "copy", "exact", "sort"])) == (
        "task 'copy' has no teacher: teachers has entries for exact, sort; add teachers.copy, or leave teachers out so"
        " that `teacher` teaches all"
    )


def test_an_entry_for_a_task_that_no_prompt_has_is_refused_with_the_tasks_there_are():
    words = "no prompt has this task; the prompts have copy, sort"
    of_teachers = config_with(teachers={"sort": A, "copy": B, "exact": B})
    assert refusal(lambda: check_tasks(of_teachers, ["sort", "copy", "sort"])) == f"teachers.exact: {words}"
    of_tasks = config_with(tasks={"sort": TaskConfig(), "srot": TaskConfig()})
    assert refusal(lambda: check_tasks(of_tasks, ["sort", "copy"])) == f"tasks.srot: {words}"


def test_tasks_that_agree_with_the_prompts_pass_and_need_no_entries():
    check_tasks(config_with(), ["sort", "copy"])
    check_tasks(config_with(teachers={"sort": A, "copy": B}, tasks={"copy": TaskConfig()}), ["sort", "copy"])


def test_a_task_without_an_entry_has_the_defaults():
    config = config_with(tasks={"sort": TaskConfig(share=2.0)})
    assert task_config(config, "sort").share == 2.0
    assert task_config(config, "copy") == TaskConfig()


def test_a_tasks_verifier_is_its_namesake_unless_another_is_named():
    config = config_with(tasks={"maths": TaskConfig(verifier="numeric"), "exact": TaskConfig(share=2.0)})
    assert [verifier_name(config, task) for task in ("maths", "exact", "sort")] == ["numeric", "exact", "sort"]


def test_the_longest_response_is_that_of_the_rollout_or_of_a_task():
    rollout = "rollout.max_response_tokens=17"
    assert max_response_tokens(config_with(rollout)) == 17
    short, long = TaskConfig(max_response_tokens=5), TaskConfig(max_response_tokens=90)
    assert max_response_tokens(config_with(rollout, tasks={"sort": short, "copy": TaskConfig()})) == 17
    assert max_response_tokens(config_with(rollout, tasks={"sort": short, "copy": long})) == 90


def test_a_task_is_sampled_as_its_own_options_say_and_otherwise_as_the_rollout():
    special = TaskConfig(samples_per_prompt=7, max_response_tokens=9, top_p=0.5)
    config = config_with(
        "rollout.samples_per_prompt=3", "rollout.max_response_tokens=17", "rollout.top_p=0.75", tasks={"sort": special}
    )
    sort, copy = training_samples(config, "sort"), training_samples(config, "copy")
    assert (sort.num_samples, sort.max_response_tokens, sort.top_p) == (7, 9, 0.5)
    assert (copy.num_samples, copy.max_response_tokens, copy.top_p) == (3, 17, 0.75)
    assert replace(sort, num_samples=3, max_response_tokens=17, top_p=0.75) == copy


def test_held_out_prompts_of_a_task_are_sampled_by_its_options_as_often_as_the_evaluation_says():
    special = TaskConfig(samples_per_prompt=7, max_response_tokens=9, top_p=0.5)
    config = config_with("eval.samples_per_prompt=5", "rollout.max_response_tokens=17", tasks={"sort": special})
    sort, copy = held_out_samples(config, "sort"), held_out_samples(config, "copy")
    assert (sort.num_samples, sort.max_response_tokens, sort.top_p) == (5, 9, 0.5)
    assert (copy.num_samples, copy.max_response_tokens, copy.top_p) == (5, 17, 1.0)


def test_one_teacher_with_a_context_for_each_task_is_one_pool():
    teachers = {"sort": replace(A, context="{prompt}"), "copy": replace(A, context="{answer} {prompt}"), "exact": A}
    config = config_with(teachers=teachers)
    assert list(teachers_of(config).by_name) == ["sort"]
    assert [context_of(config, task) for task in teachers] == ["{prompt}", "{answer} {prompt}", None]
    assert context_of(config, "unknown") is None


def test_without_teachers_by_task_every_task_has_the_one_context():
    assert context_of(config_with("teacher.context='1 {prompt}'"), "anything") == "1 {prompt}"
