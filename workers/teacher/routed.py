"""Several teachers as one: every group goes to the teacher of its task."""

from collections.abc import Mapping, Sequence

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


class RoutedTeachers:
    """`TeacherFleet` that hands each group on."""

    def __init__(self, fleets: Mapping[str, TeacherFleet], teachers: Teachers) -> None:
        self._fleets = fleets
        self._teachers = teachers

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        """Dispatch scoring, in the order of the groups; return at once."""
        return [
            self._fleets[self._teachers.name_of(group.request.prompt.task)].score([group], request)[0]
            for group in groups
        ]

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        """Wait for scores and return their summaries, in order."""
        return [self._fleets[score.teacher].summaries([score])[0] for score in scores]

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
