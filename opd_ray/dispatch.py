"""Starts groups: the request of a place in the stream of prompts, sampled and then scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opd_ray.protocol import (
    GenerateRequest,
    GroupHandle,
    Prompt,
    RolloutFleet,
    SamplingOptions,
    ScoreHandle,
    ScoreRequest,
    TeacherFleet,
)
from opd_ray.schedule import request_seed
from opd_ray.services import PromptSource


class Place(NamedTuple):
    """Where a group stands in the endless stream of prompts."""

    step: int  # the update whose batch of prompts it belongs to
    position: int  # in that batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A group on its way, and its score."""

    group: GroupHandle
    score: ScoreHandle

    @property
    def place(self) -> Place:
        """Return where it stands in the stream of prompts."""
        return Place(self.group.request.step, self.group.request.position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatcher:
    """Everything a request is made of, and whom it goes to."""

    rollout: RolloutFleet
    teacher: TeacherFleet
    prompts: PromptSource
    sampling: Mapping[str, SamplingOptions]  # by task
    asked: ScoreRequest
    seed: int  # of the run

    def start(self, places: Sequence[Place], *, version: int, attempt: int = 0) -> list[Flight]:
        """Have the groups of some places sampled by a version or a newer one, and each scored when it is finished.

        attempt: 0 for the prompt of the place itself, else the number of its replacement.
        """
        requests = [
            GenerateRequest(
                prompt=prompt,
                sampling=self.sampling[prompt.task],
                version=version,
                seed=request_seed(
                    self.seed, step=place.step, prompt_index=prompt.index, position=place.position, attempt=attempt
                ),
                step=place.step,
                position=place.position,
            )
            for place, prompt in zip(places, self._prompts(places, attempt=attempt), strict=True)
        ]
        groups = self.rollout.generate(requests)
        scores = self.teacher.score(groups, self.asked)
        return [Flight(group=group, score=score) for group, score in zip(groups, scores, strict=True)]

    def _prompts(self, places: Sequence[Place], *, attempt: int) -> list[Prompt]:
        if attempt:
            return [self.prompts.replacement(p.step, position=p.position, attempt=attempt) for p in places]
        batches = {step: self.prompts.batch(step) for step in {place.step for place in places}}
        return [batches[place.step][place.position] for place in places]
