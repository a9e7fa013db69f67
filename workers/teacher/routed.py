"""Several teachers as one: every group goes to the teacher of its task."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from opd_ray.protocol import (
    GroupHandle,
    Metrics,
    ScoreHandle,
    ScoreRequest,
    ScoreSummary,
    TeacherFleet,
    WeightBundle,
)
from opd_ray.routing import Teachers

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


class RoutedTeachers:
    """`TeacherFleet` that hands each group on."""

    def __init__(self, fleets: Mapping[str, TeacherFleet], teachers: Teachers) -> None:
        self._fleets = fleets
        self._teachers = teachers

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        """Dispatch scoring, in the order of the groups; return at once."""
        names = [self._teachers.name_of(group.request.prompt.task) for group in groups]
        return _by_name(names, groups, lambda name, of_name: self._fleets[name].score(of_name, request))

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        """Wait for scores and return their summaries, in order."""
        names = [score.teacher for score in scores]
        return _by_name(names, scores, lambda name, of_name: self._fleets[name].summaries(of_name))

    def follow(self, weights: WeightBundle) -> Metrics:
        """Show a new version of the student to all; return the longest times."""
        metrics: dict[str, float] = {}
        for fleet in self._fleets.values():
            for name, value in fleet.follow(weights).items():
                metrics[name] = max(value, metrics.get(name, value))
        return metrics

    def save(self, folder: str) -> None:
        """Write the state of all that have one."""
        for fleet in self._fleets.values():
            fleet.save(folder)

    def restore(self, folder: str) -> None:
        """Load the state of all that have one."""
        for fleet in self._fleets.values():
            fleet.restore(folder)


def _by_name(
    names: Sequence[str], items: Sequence[_Asked], ask: Callable[[str, Sequence[_Asked]], Sequence[_Answer]]
) -> list[_Answer]:
    """Ask each name about all of its items at once; return the answers in the items' order."""
    answers = {
        name: iter(ask(name, [item for item, of_item in zip(items, names, strict=True) if of_item == name]))
        for name in dict.fromkeys(names)
    }
    return [next(answers[name]) for name in names]
