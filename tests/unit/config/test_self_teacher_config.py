import pytest
from config_files import compose_config, compose_raw, refusal
from omegaconf import OmegaConf

from opd_ray.config.load import load
from opd_ray.config.schema import TeacherConfig, TinyModelConfig
from opd_ray.config.teacher import SelfUpdate, TeacherKind, check_context, shows_answer

RUN = ("name=run", "num_steps=3", "student.path=student", "data.task=sort")


def test_a_teacher_that_is_the_student_has_its_path_without_being_told() -> None:
    config = compose_config(*RUN, "teacher=self")
    assert (config.teacher.kind, config.teacher.path) == (TeacherKind.self, "student")
    assert config.teacher.self.update is SelfUpdate.frozen


def test_so_has_each_of_several_and_every_other_path_must_still_be_given() -> None:
    teachers = "+teachers={sort: {kind: self, context: 'a {prompt}'}, copy: {path: x}}"
    config = compose_config(*RUN, "teacher=self", teachers)
    assert {task: teacher.path for task, teacher in config.teachers.items()} == {"sort": "student", "copy": "x"}
    assert "teachers.copy.path is not given" in refusal(
        lambda: compose_config(*RUN, "teacher=self", "+teachers={copy: {kind: vllm}}")
    )
    assert "teacher.path is not given" in refusal(lambda: compose_config(*RUN))


def test_loading_leaves_the_composed_configuration_as_it_was() -> None:
    composed = compose_raw(*RUN, "teacher=self")
    load(composed)
    assert composed.student.path == "student"
    assert OmegaConf.is_missing(composed.teacher, "path")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.path=x"], "teacher.path=x with kind=self: expected student.path=student"),
        (["teacher.self.ema_decay=1.5"], "teacher.self.ema_decay=1.5: expected a number in [0, 1]"),
        (["teacher.alignment=bytes"], "teacher.alignment=bytes: expected none with kind=self"),
        (["teacher.kind=vllm", "teacher.path=x", "teacher.self.update=ema"], "expected its default unless kind=self"),
    ],
)
def test_what_does_not_go_with_self_is_refused_by_its_key(overrides: list[str], words: str) -> None:
    assert words in refusal(lambda: compose_config(*RUN, "teacher=self", *overrides))


def test_a_model_of_its_own_is_not_built_for_it() -> None:
    message = refusal(lambda: TeacherConfig(path="student", kind=TeacherKind.self, build=TinyModelConfig()))
    assert message.startswith("teacher.build={...}: expected null with kind=self")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{answer}", "the teacher would not see the prompt"),
        ("", "the teacher would not see the prompt"),
        ("{prompt} {solution}", "{solution} is no placeholder"),
        ("{prompt} {}", "{} is no placeholder"),
        ("{prompt!r}", "{prompt!r} is no placeholder"),
        ("{prompt:>9}", "{prompt:>9} is no placeholder"),
        ("{prompt} {", "write {{ and }} for braces"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, words: str) -> None:
    message = refusal(lambda: check_context(template))
    assert message.startswith("teacher.context=")
    assert words in message


def test_a_template_may_have_braces_and_need_no_answer() -> None:
    check_context("\\boxed{{{answer}}} {prompt}")
    assert shows_answer("\\boxed{{{answer}}} {prompt}")
    assert not shows_answer("{{answer}} {prompt}")
