from dataclasses import replace

import pytest
from config_files import MANDATORY, compose_config
from preflight_facts import STUDENT

from opd_ray.preflight.finding import Status
from opd_ray.preflight.models import (
    chat_templates,
    context,
    end_tokens,
    own_teachers,
    special_tokens,
    top_k,
    vocabulary,
)

TEACHER = replace(STUDENT, key="teacher.path")


def test_models_of_one_family_are_green():
    for finding in (
        special_tokens(STUDENT, [TEACHER]),
        end_tokens(STUDENT, [TEACHER], equivalent=[]),
        chat_templates(STUDENT, [TEACHER]),
        vocabulary(STUDENT, [TEACHER]),
    ):
        assert finding.status is Status.ok
        assert finding.advice == ""


def test_another_padding_token_is_named():
    other = replace(TEACHER, special_tokens={"eos_token": "<end>", "pad_token": "<nothing>"})
    finding = special_tokens(STUDENT, [other])
    assert finding.status is Status.warning
    assert finding.found == "pad_token is <pad> to student.path and <nothing> to teacher.path"


def test_other_end_tokens_are_named_and_the_key_that_makes_them_one_mends_it():
    other = replace(TEACHER, end_tokens=frozenset({"<stop>"}))
    finding = end_tokens(STUDENT, [TEACHER, other], equivalent=[])
    assert finding.status is Status.warning
    assert finding.found == "student.path ends with <end>, teacher.path with <stop>"
    assert """'objective.equivalent_tokens=[["<end>","<stop>"]]'""" in finding.advice
    assert end_tokens(STUDENT, [TEACHER, other], equivalent=[["<end>", "<stop>"]]).status is Status.ok


def test_another_chat_template_is_a_warning():
    finding = chat_templates(STUDENT, [replace(TEACHER, chat_template=None)])
    assert finding.status is Status.warning
    assert "student.path has a template of its own; teacher.path has none" in finding.found


def test_padded_rows_are_green_and_tokens_without_a_row_are_not():
    assert vocabulary(STUDENT, [replace(TEACHER, num_rows=160)]).status is Status.ok
    finding = vocabulary(STUDENT, [replace(TEACHER, num_rows=96)])
    assert finding.status is Status.warning
    assert "common range 96, 100 tokens; ids 96 to 99 lie beyond it" in finding.found


def test_a_support_larger_than_the_vocabulary_is_red():
    config = compose_config(*MANDATORY, "objective.top_k=64")
    assert top_k(config, vocab_size=64).status is Status.ok
    assert top_k(config, vocab_size=63).status is Status.error


def test_a_sequence_longer_than_a_models_positions_is_red_unless_overrides_may_lengthen_them():
    config = compose_config(*MANDATORY)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert context(config, STUDENT, [replace(TEACHER, max_positions=longest)]).status is Status.ok
    assert context(config, STUDENT, [replace(TEACHER, max_positions=None)]).status is Status.ok
    short = [replace(TEACHER, max_positions=longest - 1)]
    finding = context(config, STUDENT, short)
    assert finding.status is Status.error
    assert finding.found.endswith(f"max_position_embeddings: teacher.path {longest - 1:,}")
    config = compose_config(*MANDATORY, "+teacher.engine_args.hf_overrides={rope_theta:1e7}")
    assert context(config, STUDENT, short).status is Status.warning


def test_the_longest_response_of_any_task_counts():
    config = compose_config(*MANDATORY, "+tasks={sort:{max_response_tokens:2000}}")
    assert context(config, STUDENT, [TEACHER]).status is Status.error


@pytest.mark.parametrize(
    ("overrides", "status"),
    [
        ([], Status.ok),
        (["teacher=self", "teacher.path=student"], Status.warning),
        (["teacher=self", "teacher.path=student", "teacher.self.update=ema"], Status.warning),
        (["teacher=self", "teacher.path=student", "teacher.context='1 {prompt}'"], Status.ok),
        (["+teachers={a: {path: x}, b: {kind: self}}"], Status.warning),
    ],
)
def test_a_teacher_that_is_the_student_and_knows_no_more_is_yellow(overrides: list[str], status: Status):
    finding = own_teachers(compose_config(*MANDATORY, *overrides))
    assert finding.status is status
    assert ("teacher.context" in finding.advice) == (status is Status.warning)
