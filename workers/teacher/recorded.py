"""A teacher that spoke in an earlier run: every group's score is looked up by the group itself."""

import asyncio
import time
from dataclasses import replace

from opd_ray.config.teacher import CacheTeacherConfig
from opd_ray.protocol import Payload, SampledScore, Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from opd_ray.scores.files import DamagedRecording, ShardReader, read_recording
from opd_ray.scores.messages import group_key
from workers.teacher.errors import BadScore


class RecordedTeacher:
    """Serves the recorded payload; `sampled` also from the sampled tokens' log-probs of a larger one."""

    def __init__(self, config: CacheTeacherConfig) -> None:
        recording = read_recording(config.path)
        self._groups = {group.group_key: group for group in recording.groups}
        self._shards = ShardReader(recording.folder)

    async def ready(self) -> bool:
        """Answer once the index is read."""
        return True

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Return a group's recorded score. Raises BadScore for a group that was not recorded, or is damaged."""
        start = time.perf_counter()
        summary, score = await asyncio.to_thread(self._read, group)
        if request.payload is Payload.sampled and not isinstance(score, SampledScore):
            score = SampledScore(logprobs_N=score.sampled_logprobs_N)
            summary = replace(summary, num_bytes=score.logprobs_N.nbytes)
        return replace(summary, score_s=time.perf_counter() - start), score

    def _read(self, group: TrajectoryGroup) -> tuple[ScoreSummary, Score]:
        recorded = self._groups.get(group_key(group))
        if recorded is None:
            raise BadScore(f"the group of prompt {group.prompt_index} ({group.task}) was not recorded")
        try:
            return self._shards.score(recorded)
        except DamagedRecording as error:
            raise BadScore(str(error)) from None
