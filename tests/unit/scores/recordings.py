"""Recordings by hand, for the tests of scores on disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.config.schema import Config
from opd_ray.data.models import Models
from opd_ray.protocol import (
    GroupSummary,
    HiddenScore,
    SampledScore,
    Score,
    ScoreSummary,
    SupportScore,
    TrajectoryGroup,
)
from opd_ray.scores.files import Recording, prepare_folder, read_recording, write_update
from opd_ray.scores.manifest import Manifest, manifest_of
from opd_ray.scores.messages import Scored


class FakeTokenizer:
    def __init__(self, *tokens: str) -> None:
        self._vocabulary = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


TOKENIZER = FakeTokenizer("a", "b", "c")
MODELS = Models(tokenizer=TOKENIZER, vocab_size=14, teacher_hidden_size=8)


def make_recorded_group(
    *prompt: int, responses: Sequence[Sequence[int]] = ((5, 6), (7,)), task: str = "sort", rewards: int = 2
) -> TrajectoryGroup:
    lengths = [len(response) for response in responses]
    num_tokens = sum(lengths)
    return TrajectoryGroup(
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.concatenate([np.array(r, dtype=np.int32) for r in responses]),
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        sampled_logprobs=np.linspace(-1, 0, num_tokens, dtype=np.float32),
        token_versions=np.full(num_tokens, 4, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
        rewards=np.ones(rewards, dtype=np.float32),
        finish=np.zeros(len(responses), dtype=np.int8),
        prompt_index=prompt[0],
        task=task,
        seed=11,
    )


def sampled_score(num_tokens: int) -> SampledScore:
    return SampledScore(logprobs_N=-np.arange(num_tokens, dtype=np.float32))


def support_score(num_tokens: int) -> SupportScore:
    return SupportScore(
        low_ids_NK=np.arange(2 * num_tokens, dtype=np.uint16).reshape(num_tokens, 2),
        page_starts_NH=np.empty((num_tokens, 0), dtype=np.uint16),
        logprobs_NK=np.random.default_rng(0).normal(size=(2, num_tokens)).astype(np.float32).T,  # not contiguous
        sampled_logprobs_N=np.full(num_tokens, np.nan, dtype=np.float32),
    )


def hidden_score(num_tokens: int) -> HiddenScore:
    bits = np.random.default_rng(0).integers(0, 2**16, size=(num_tokens, 8), dtype=np.uint16)
    return HiddenScore(hidden_ND=bits, sampled_logprobs_N=np.empty(0, dtype=np.float32))


def make_scored(group: TrajectoryGroup, score: Score | None = None, *, teacher: str = "teacher") -> Scored:
    num_tokens = len(group.response_ids)
    summary = GroupSummary(
        prompt_index=group.prompt_index,
        task=group.task,
        num_prompt_tokens=len(group.prompt_ids),
        response_lengths=tuple(np.diff(group.offsets).tolist()),
        num_loss_tokens=num_tokens,
        num_truncated=0,
        rewards=tuple(group.rewards.tolist()),
        oldest_version=4,
        text="3142=",
        generate_s=0.5,
    )
    of_score = ScoreSummary(num_tokens=num_tokens, num_bytes=12, dropped_mass_sum=float("nan"), score_s=0.25)
    return Scored(
        teacher=teacher,
        group_summary=summary,
        group=group,
        score_summary=of_score,
        score=sampled_score(num_tokens) if score is None else score,
    )


def make_manifest(config: Config, **changes: Any) -> Manifest:
    manifest = manifest_of(
        config, tokenizer=TOKENIZER, vocab_size=14, teacher_hidden_size=8, equivalent_ids=(), head_keys={}
    )
    return replace(manifest, **changes)


def record(
    folder: Path, config: Config, updates: Sequence[Sequence[Scored]], *, step: int = 0, **changes: Any
) -> Recording:
    """Write updates as a run of this configuration would, and read the folder's index."""
    prepare_folder(folder, make_manifest(config, **changes), step=step)
    for number, scored in enumerate(updates, start=step):
        write_update(folder, step=number, scored=scored)
    return read_recording(folder)
