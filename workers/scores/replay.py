"""Serves recorded groups in the place of sampling; evaluation still samples from the student in training."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opd_ray.protocol import (
    GenerateRequest,
    GroupHandle,
    GroupSummary,
    Metrics,
    RolloutFleet,
    TrajectoryGroup,
    WeightBundle,
)
from opd_ray.scores.files import ShardReader, read_recording


class GroupReader:
    """Reads recorded groups, in the order asked."""

    def __init__(self, *, folder: str) -> None:
        recording = read_recording(folder)
        self._groups = recording.groups
        self._shards = ShardReader(recording.folder)

    def read(self, position: int) -> tuple[GroupSummary, TrajectoryGroup]:
        """Return the group at a position of the index. Raises DamagedRecording, which ends the run."""
        start = time.perf_counter()
        summary, group = self._shards.group(self._groups[position])
        return replace(summary, generate_s=time.perf_counter() - start), group


class ReplayRollout:
    """`RolloutFleet` whose prompts are places in a recording (`recorded_prompts`); weights go to the live one."""

    def __init__(self, live: RolloutFleet, *, reader: Any) -> None:
        self._live = live
        self._reader = reader

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        """Return what was recorded, whatever sampling options, seed and version are asked."""
        return [self._read(request) for request in requests]

    def load(self, weights: WeightBundle) -> Metrics:
        """Give the live workers a new version: evaluation asks them."""
        return self._live.load(weights)

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        """Wait for groups and return their summaries, in order."""
        return self._live.summaries(groups)

    def first(self, groups: Sequence[GroupHandle], *, num_groups: int) -> list[int]:
        """Wait until as many groups are read and return their positions, ascending."""
        return self._live.first(groups, num_groups=num_groups)

    def _read(self, request: GenerateRequest) -> GroupHandle:
        summary, group = self._reader.read.options(num_returns=2).remote(request.prompt.index)
        return GroupHandle(request=request, summary=summary, group=group)
