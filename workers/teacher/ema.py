"""The student as its own teacher: an exponential moving average of its weights, served by a teacher worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opd_ray.protocol import Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from workers.teacher.aligned import Scorer
from workers.weights import Buffers, WeightManifest, plan_manifest, read_tensors

_VERSION = "version"  # key in the file's metadata


class LoadableScorer(Scorer, Protocol):
    """A teacher worker whose weights can be changed while no `score` is under way."""

    async def load(self, manifest: WeightManifest, buffers: Buffers) -> None:
        """Take all weights of a publication."""


class EmaWeights:
    """mean <- decay * mean + (1 - decay) * student, in float32, in buffers as publications are."""

    def __init__(self, *, decay: float) -> None:
        self.manifest: WeightManifest | None = None  # None: nothing taken yet
        self.buffers: Buffers = ()
        self._decay = decay

    def take(self, manifest: WeightManifest, buffers: Buffers) -> bool:
        """Take a published version into the average, the first as it is; return whether anything changed.

        A version that the average has seen is not taken again: a resumed run publishes it once more.
        """
        if self.manifest is None:
            self._hold(read_tensors(buffers, manifest), version=manifest.version)
            return True
        if manifest.version <= self.manifest.version:
            return False
        student = dict(read_tensors(buffers, manifest))
        for name, mean in read_tensors(self.buffers, self.manifest):
            mean.lerp_(student[name].float(), 1 - self._decay)
        self.manifest = replace(self.manifest, version=manifest.version)
        return True

    def save(self, path: str) -> None:
        """Write the average to a safetensors file."""
        assert self.manifest is not None
        tensors = dict(read_tensors(self.buffers, self.manifest))
        save_file(tensors, path, metadata={_VERSION: str(self.manifest.version)})

    def restore(self, path: str) -> None:
        """Take the average from a file that `save` has written. Raises ValueError when there is none."""
        if not Path(path).is_file():
            raise ValueError(
                f"{path}: no such file; the checkpoint is of a run whose teacher was no average of the student:"
                " expected one with teacher.self.update=ema"
            )
        with safe_open(path, framework="pt") as tensors:
            named = [(name, tensors.get_tensor(name)) for name in tensors.keys()]  # noqa: SIM118 - no mapping
            self._hold(named, version=int(tensors.metadata()[_VERSION]))

    def _hold(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        tensors = dict(named)
        shapes = [(name, torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()]
        self.manifest = plan_manifest(shapes, version=version)
        self.buffers = tuple(np.empty(entry.num_bytes, dtype=np.uint8) for entry in self.manifest.entries)
        for name, mean in read_tensors(self.buffers, self.manifest):
            mean.copy_(tensors[name])


class EmaTeacher:
    """Serves `score` calls concurrently; takes new weights only while none is under way."""

    def __init__(self, worker: LoadableScorer, *, decay: float) -> None:
        self._worker = worker
        self._weights = EmaWeights(decay=decay)
        self._changed = asyncio.Condition()
        self._num_scoring = 0
        self._loading = False

    async def ready(self) -> bool:
        """Answer once the worker can score."""
        return await self._worker.ready()

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group with one version of the average, the newest at the time."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._loading)
            self._num_scoring += 1
        try:
            return await self._worker.score(group, request)
        finally:
            async with self._changed:
                self._num_scoring -= 1
                self._changed.notify_all()

    async def follow(self, manifest: WeightManifest, buffers: Buffers) -> float:
        """Take a published version of the student into the average; return the seconds it took, waiting included."""
        start = time.perf_counter()
        async with self._alone():
            if await asyncio.to_thread(self._weights.take, manifest, buffers):
                await self._load()
        return time.perf_counter() - start

    async def save(self, path: str) -> None:
        """Write the average to a safetensors file."""
        async with self._alone():
            await asyncio.to_thread(self._weights.save, path)

    async def restore(self, path: str) -> None:
        """Take the average from a file that `save` has written. Raises ValueError when there is none."""
        async with self._alone():
            await asyncio.to_thread(self._weights.restore, path)
            await self._load()

    async def _load(self) -> None:
        assert self._weights.manifest is not None
        await self._worker.load(self._weights.manifest, self._weights.buffers)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Wait until no score is under way, and let none begin."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._loading)
            self._loading = True
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._num_scoring == 0)
            yield
        finally:
            async with self._changed:
                self._loading = False
                self._changed.notify_all()
