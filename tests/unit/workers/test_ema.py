import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from groups import make_group

from opd_ray.protocol import Payload, SampledScore, Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from workers.teacher.ema import EmaTeacher, EmaWeights
from workers.weights import Buffers, WeightManifest, published, read_tensors

GROUP = make_group([1], [2, 3])
REQUEST = ScoreRequest(payload=Payload.sampled)
SHAPES = {"a": (3, 2), "b": (5,)}


def publish(version: int, *, seed: int, dtype: torch.dtype = torch.float32) -> tuple[WeightManifest, Buffers]:
    """Return a publication of random tensors, read-only as Ray's are."""
    generator = torch.Generator().manual_seed(seed)
    named = [(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()]
    manifest, buffers = published(named, version=version)
    for buffer in buffers:
        buffer.flags.writeable = False
    return manifest, buffers


def tensors(publication: tuple[WeightManifest, Buffers]) -> dict[str, torch.Tensor]:
    manifest, buffers = publication
    return {name: tensor.double() for name, tensor in read_tensors(buffers, manifest)}


def mean(weights: EmaWeights) -> dict[str, torch.Tensor]:
    assert weights.manifest is not None
    return tensors((weights.manifest, weights.buffers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_after_n_updates_the_average_is_the_closed_form(decay: float, dtype: torch.dtype) -> None:
    versions = [publish(version, seed=version, dtype=dtype) for version in range(6)]
    weights = EmaWeights(decay=decay)
    for one in versions:
        assert weights.take(*one)
    last = len(versions) - 1
    factors = [decay**last, *((1 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    for name in SHAPES:
        expected = sum(f * tensors(one)[name] for f, one in zip(factors, versions, strict=True))
        torch.testing.assert_close(mean(weights)[name], expected, atol=1e-6, rtol=0)
    assert weights.manifest is not None
    assert weights.manifest.version == last
    assert {entry.dtype for entry in weights.manifest.entries} == {"float32"}


@pytest.mark.parametrize(("decay", "kept"), [(0.0, 1), (1.0, 0)])
def test_without_decay_it_is_the_newest_student_and_with_decay_one_the_first_to_the_bit(decay: float, kept: int):
    versions = [publish(0, seed=1), publish(1, seed=2)]
    weights = EmaWeights(decay=decay)
    for one in versions:
        weights.take(*one)
    for name, tensor in tensors(versions[kept]).items():
        assert torch.equal(mean(weights)[name], tensor)


def test_a_version_is_taken_once() -> None:
    weights = EmaWeights(decay=0.5)
    weights.take(*publish(3, seed=1))
    before = mean(weights)
    assert not weights.take(*publish(3, seed=2))
    assert not weights.take(*publish(2, seed=2))
    assert all(torch.equal(before[name], after) for name, after in mean(weights).items())


def test_a_restored_average_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = str(tmp_path / "teacher.safetensors")
    through, restored = EmaWeights(decay=0.7), EmaWeights(decay=0.7)
    through.take(*publish(0, seed=0))
    through.take(*publish(1, seed=1))
    through.save(path)
    restored.restore(path)
    assert not restored.take(*publish(1, seed=9))  # what a resumed run publishes first
    for weights in (through, restored):
        weights.take(*publish(2, seed=2))
    assert all(torch.equal(mean(restored)[name], tensor) for name, tensor in mean(through).items())


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.safetensors: no such file.*teacher\.self\.update=ema"):
        EmaWeights(decay=0.5).restore(str(tmp_path / "teacher.safetensors"))


@dataclass
class SlowWorker:
    """Says which version it had when a score began and when it ended."""

    version: int = -1
    spans: list[tuple[int, int]] = field(default_factory=list)
    num_scoring: int = 0

    async def ready(self) -> bool:
        return True

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        assert request is REQUEST
        self.num_scoring += 1
        begun = self.version
        for _ in range(5):
            await asyncio.sleep(0)
        self.spans.append((begun, self.version))
        self.num_scoring -= 1
        num_tokens = len(group.response_ids)
        score = SampledScore(logprobs_N=np.zeros(num_tokens, dtype=np.float32))
        return ScoreSummary(num_tokens=num_tokens, num_bytes=4 * num_tokens, score_s=0.0, dropped_mass_sum=0.0), score

    async def load(self, manifest: WeightManifest, buffers: Buffers) -> None:
        assert sum(buffer.nbytes for buffer in buffers) == manifest.num_bytes
        assert self.num_scoring == 0
        await asyncio.sleep(0)
        self.version = manifest.version


def test_no_score_spans_two_versions_and_scores_overlap_otherwise() -> None:
    async def scenario() -> SlowWorker:
        worker = SlowWorker()
        teacher = EmaTeacher(worker, decay=0.5)
        await teacher.follow(*publish(0, seed=0))
        calls = [asyncio.ensure_future(teacher.score(GROUP, REQUEST)) for _ in range(3)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert worker.num_scoring == 3
        following = asyncio.ensure_future(teacher.follow(*publish(1, seed=1)))
        await asyncio.sleep(0)
        calls += [asyncio.ensure_future(teacher.score(GROUP, REQUEST)) for _ in range(3)]
        await asyncio.gather(following, *calls)
        return worker

    assert asyncio.run(scenario()).spans == [(0, 0)] * 3 + [(1, 1)] * 3
