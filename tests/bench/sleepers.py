"""Workers that sleep in the place of engines: they take and give the project's messages, as late as they are told to.

The case whose costs hold is the task of the prompt.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pipeline_work import NUM_SLOTS, Costs, Slots, response_tokens

from opd_ray.dispatch import Place
from opd_ray.protocol import (
    GenerateRequest,
    GroupSummary,
    SampledScore,
    ScoreRequest,
    ScoreSummary,
    TrajectoryGroup,
)
from workers.learner.report import GapSums, RankBatch, RankReport
from workers.rollout.turns import Turn
from workers.weights import Buffers, WeightManifest

_NO_GAPS = GapSums(num_tokens=0, gap_sum=0.0, gap_max=0.0, signal_sum=0.0)


class SleepingRollout:
    """An engine that generates NUM_SLOTS responses at once."""

    def __init__(self, **_: Any) -> None:
        self._slots = Slots(NUM_SLOTS)
        self._version = -1
        self._places: list[Place] = []

    async def ready(self) -> bool:
        """Answer at once."""
        return True

    async def prepare(self, manifest: WeightManifest, buffers: Buffers, turn: Turn | None = None) -> None:
        """Hold a version."""

    async def commit(self, version: int) -> None:
        """Take the version; a new run begins with the first."""
        self._version = version
        if version == 0:
            self._places = []

    async def places(self) -> list[Place]:
        """Return the groups of this run in the order in which they came."""
        return self._places

    async def generate_all(self, requests: Sequence[GenerateRequest], turns: Sequence[Turn | None]) -> list[Any]:
        """Answer several calls of `generate` in one."""
        answers = await asyncio.gather(*map(self.generate, requests, turns))
        return [part for answer in answers for part in answer]

    async def generate(self, request: GenerateRequest, turn: Turn | None = None) -> tuple[GroupSummary, Any]:  # noqa: ARG002
        """Resolve when the last response has had its time in a slot."""
        start = time.perf_counter()
        assert request.version <= self._version, (request.version, self._version)
        self._places.append(Place(request.step, request.position))
        lengths = response_tokens(request.step, request.position)
        costs = Costs.of(request.prompt.task)
        await asyncio.sleep(max(self._slots.take_now(n * costs.generate_s) for n in lengths))
        group = _group(request, lengths, version=request.version)
        return _summary(group, lengths, seconds=time.perf_counter() - start), group


class SleepingTeacher:
    """Scores one group after the other."""

    def __init__(self, **_: Any) -> None:
        self._slots = Slots(1)

    async def ready(self) -> bool:
        """Answer at once."""
        return True

    async def score_all(self, request: ScoreRequest, *groups: TrajectoryGroup) -> list[ScoreSummary | SampledScore]:
        """Answer several calls of `score` in one."""
        answers = await asyncio.gather(*(self.score(group, request) for group in groups))
        return [part for answer in answers for part in answer]

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, SampledScore]:  # noqa: ARG002
        """Resolve when it has been the group's turn."""
        start = time.perf_counter()
        num_tokens = len(group.response_ids)
        await asyncio.sleep(self._slots.take_now(num_tokens * Costs.of(group.task).score_s))
        score = SampledScore(logprobs_N=np.zeros(num_tokens, dtype=np.float32))
        seconds = time.perf_counter() - start
        return ScoreSummary(
            num_tokens=num_tokens, num_bytes=score.logprobs_N.nbytes, dropped_mass_sum=0.0, score_s=seconds
        ), score


class SleepingLearner:
    """The only rank; its weights are empty."""

    def __init__(self, **_: Any) -> None: ...

    def rendezvous(self, *, local: bool) -> tuple[str, int]:  # noqa: ARG002
        """Nobody is to be met."""
        return "127.0.0.1", 0

    def setup(self, *, rank: int, master_address: str, master_port: int) -> None:
        """Nothing is to be built."""

    def publish(self, version: int) -> tuple[WeightManifest, Buffers]:
        """Return no tensors."""
        return WeightManifest(version=version, entries=()), ()

    def update(self, batch: RankBatch, *groups_and_scores: Any) -> RankReport:
        """Sleep for the tokens of the groups; every group has its score."""
        start = time.perf_counter()
        groups, scores = groups_and_scores[: batch.num_groups], groups_and_scores[batch.num_groups :]
        num_tokens = sum(len(group.response_ids) for group in groups)
        assert num_tokens == sum(len(score.logprobs_N) for score in scores)
        ages = [batch.version - int(group.token_versions.min()) for group in groups]
        time.sleep(max(0.0, num_tokens * Costs.of(groups[0].task).learn_s - (time.perf_counter() - start)))
        return RankReport(
            loss_sum=0.0,
            denominator=float(num_tokens),
            divergence_sum=0.0,
            num_tokens=num_tokens,
            num_sampled=num_tokens,
            stat_sums={"signal": 0.0},
            diagnostic_sums={},
            num_diagnosed=0,
            fresh_gaps=_NO_GAPS,
            stale_gaps=_NO_GAPS,
            recorded_gaps=_NO_GAPS,
            age_sum=float(sum(ages)),
            age_max=max(ages),
            num_recorded=0,
            grad_norm=0.0,
            lr=0.0,
            learn_s=time.perf_counter() - start,
        )


def _group(request: GenerateRequest, lengths: list[int], *, version: int) -> TrajectoryGroup:
    num_tokens = sum(lengths)
    return TrajectoryGroup(
        prompt_ids=request.prompt.ids_P,
        response_ids=np.zeros(num_tokens, dtype=np.int32),
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        sampled_logprobs=np.zeros(num_tokens, dtype=np.float32),
        token_versions=np.full(num_tokens, version, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
        rewards=np.empty(0, dtype=np.float32),
        finish=np.zeros(len(lengths), dtype=np.int8),
        prompt_index=request.prompt.index,
        task=request.prompt.task,
        seed=request.seed,
    )


def _summary(group: TrajectoryGroup, lengths: list[int], *, seconds: float) -> GroupSummary:
    return GroupSummary(
        prompt_index=group.prompt_index,
        task=group.task,
        num_prompt_tokens=len(group.prompt_ids),
        response_lengths=tuple(lengths),
        num_loss_tokens=sum(lengths),
        num_truncated=0,
        rewards=(),
        oldest_version=int(group.token_versions.min()),
        text="",
        generate_s=seconds,
    )
