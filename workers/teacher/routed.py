"""Several teachers as one: every group goes to the teacher of its task."""

from collections.abc import Mapping, Sequence

from opd_ray.protocol import GroupHandle, ScoreHandle, ScoreRequest, ScoreSummary, TeacherFleet
from opd_ray.routing import Teachers


class RoutedTeachers:
    """`TeacherFleet` that hands each group on."""

    def __init__(self, fleets: Mapping[str, TeacherFleet], teachers: Teachers) -> None:
        self._fleets = fleets
        self._teachers = teachers

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        """Dispatch scoring, in the order of the groups; return at once."""
        return [self._fleets[self._teachers.name_of(group.task)].score([group], request)[0] for group in groups]

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        """Wait for scores and return their summaries, in order."""
        return [self._fleets[score.teacher].summaries([score])[0] for score in scores]
