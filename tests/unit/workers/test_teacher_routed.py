from dataclasses import dataclass, field

from fakes import make_request

from opd_ray.config.schema import TeacherConfig
from opd_ray.protocol import GroupHandle, Metrics, Payload, ScoreHandle, ScoreRequest, WeightBundle
from opd_ray.routing import Teachers
from workers.teacher.routed import RoutedTeachers

ASKED = ScoreRequest(payload=Payload.hidden)


@dataclass
class NamedTeacher:
    name: str
    asked: list[ScoreRequest] = field(default_factory=list)
    did: list[object] = field(default_factory=list)
    load_s: float | None = None  # None: it does not follow the student

    def score(self, groups: list[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        self.asked.append(request)
        return [
            ScoreHandle(teacher=self.name, summary=("by", self.name, g.group), score=("score of", g.group))
            for g in groups
        ]

    def summaries(self, scores: list[ScoreHandle]) -> list[object]:
        assert {score.teacher for score in scores} == {self.name}
        return [score.summary for score in scores]

    def follow(self, weights: WeightBundle) -> Metrics:
        self.did.append(weights.version)
        return {} if self.load_s is None else {"time/teacher_load_s": self.load_s}

    def save(self, folder: str) -> None:
        self.did.append(f"save {folder}")

    def restore(self, folder: str) -> None:
        self.did.append(f"restore {folder}")


def route(*tasks: str, of_task: dict[str, str]) -> tuple[list[ScoreHandle], dict[str, NamedTeacher]]:
    """Return the scores of one group of each task, which is known by its position, and the teachers."""
    fleets = {name: NamedTeacher(name) for name in sorted(set(of_task.values())) or ["teacher"]}
    teachers = Teachers(by_name={name: TeacherConfig(path=name) for name in fleets}, of_task=of_task)
    groups = [
        GroupHandle(request=make_request(task=task), summary=None, group=position)
        for position, task in enumerate(tasks)
    ]
    return RoutedTeachers(fleets, teachers).score(groups, ASKED), fleets


def test_every_group_goes_to_the_teacher_of_its_task_and_the_scores_keep_the_order_of_the_groups():
    scores, fleets = route("b", "a", "b", "c", "a", of_task={"a": "a", "b": "b", "c": "a"})
    assert [score.teacher for score in scores] == ["b", "a", "b", "a", "a"]
    assert [score.score for score in scores] == [("score of", position) for position in range(5)]
    assert fleets["a"].asked == [ASKED]  # once, about all of its groups: they may share calls
    assert fleets["b"].asked == [ASKED]


def test_the_one_teacher_scores_the_groups_of_all_tasks():
    scores, _ = route("b", "a", of_task={})
    assert [score.teacher for score in scores] == ["teacher", "teacher"]


def test_no_groups_are_no_scores_and_nobody_is_asked():
    scores, fleets = route(of_task={"a": "a"})
    assert scores == []
    assert fleets["a"].asked == []


def test_every_score_is_waited_for_at_its_own_teacher_and_the_summaries_keep_their_order():
    of_task = {"a": "a", "b": "b"}
    scores, fleets = route("b", "a", "b", of_task=of_task)
    teachers = Teachers(by_name={name: TeacherConfig(path=name) for name in fleets}, of_task=of_task)
    assert RoutedTeachers(fleets, teachers).summaries(scores) == [("by", "b", 0), ("by", "a", 1), ("by", "b", 2)]


def test_every_teacher_sees_every_version_and_checkpoint_and_the_longest_time_counts():
    fleets = {"a": NamedTeacher("a", load_s=0.5), "b": NamedTeacher("b"), "c": NamedTeacher("c", load_s=0.25)}
    routed = RoutedTeachers(fleets, Teachers(by_name={}, of_task={}))
    assert routed.follow(WeightBundle(version=3, manifest=None, buffer=None)) == {"time/teacher_load_s": 0.5}
    routed.save("x")
    routed.restore("y")
    assert [fleet.did for fleet in fleets.values()] == [[3, "save x", "restore y"]] * 3
