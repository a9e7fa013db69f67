"""What each kind of teacher can say is known before anything starts."""

import pytest
from config_files import compose_config, refusal

from opd_ray.config.schema import TeacherConfig
from opd_ray.config.teacher import HttpTeacherConfig, TeacherKind
from opd_ray.routing import teachers_of
from workers import check_teachers

HTTP = ("teacher=http", "teacher.path=teacher", 'teacher.http.urls=["http://127.0.0.1:9"]', "teacher.build=null")
EMA = ("teacher=self", "teacher.self.update=ema")


def check(*overrides: str) -> None:
    config = compose_config("experiment=demo", *overrides)
    check_teachers(config, teachers_of(config).by_name.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=full"],
        ["objective=sampled", "objective.baseline=kl"],
        ["objective=support", "objective.support=union", "rollout.temperature=0.5"],
        [*HTTP, "objective=sampled"],
        [*HTTP, "objective=support", "objective.tail=bucket"],
        ["teacher.alignment=bytes", "objective=sampled", "objective.discount=0.5"],
        [*HTTP, "teacher.alignment=bytes", "objective=sampled"],
        ["teacher=self", "objective=full"],
        [*EMA, "objective=sampled"],
        [*EMA, "objective=support", "objective.support=union", "rollout.temperature=0.5"],
        ["teacher=cache", "teacher.path=teacher", "teacher.cache.path=no/such", "teacher.build=null"],  # read later
    ],
)
def test_a_teacher_that_can_say_what_is_asked_passes(overrides: list[str]):
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*HTTP, "objective=full"], "teacher teacher gives only sampled, support: objective=full"),
        ([*HTTP, "objective=support", "objective.support=student"], "objective.support=student: an HTTP teacher"),
        ([*HTTP, "objective=sampled", "rollout.temperature=0.5"], "gives only support: objective=sampled"),
        ([*EMA, "objective=full"], "teacher.self.update=ema: the learner would need the head of every version"),
        ([*EMA, "objective=sampled", "objective.baseline=kl"], "or teacher.self.update=frozen"),
        (["teacher.alignment=bytes", "objective=support"], "gives only sampled: objective=support"),
        (
            ["teacher.alignment=bytes", "objective=sampled", 'objective.equivalent_tokens=[["<eos>","<pad>"]]'],
            "objective.equivalent_tokens with runs/models/tiny-teacher",
        ),
    ],
)
def test_a_teacher_that_cannot_is_refused_with_the_reason(overrides: list[str], words: str):
    assert words in refusal(lambda: check(*overrides))


@pytest.mark.parametrize(
    ("kind", "http"), [(TeacherKind.http, None), (TeacherKind.vllm, HttpTeacherConfig(urls=["http://127.0.0.1:9"]))]
)
def test_urls_are_given_exactly_with_a_teacher_behind_a_server(kind: TeacherKind, http: HttpTeacherConfig | None):
    with pytest.raises(ValueError, match=r"teacher\.http=.*: expected urls exactly with kind=http"):
        TeacherConfig(path="teacher", kind=kind, http=http)
