"""The contract of a way of new weights: what a learner rank does, and which way ends in which engine of vLLM.

A version goes out in two steps. Every rollout worker prepares it, which changes nothing: it checks the manifest against
its model and holds the bytes, where they travel through the object store. When all have, it is committed on all,
between two steps of each engine (`workers.sync.deliver`, `workers.sync.receiver`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

from workers.weights import Buffers, WeightManifest

Publication = tuple[WeightManifest | None, Buffers | None]  # None, None on ranks that only help to gather


class Publisher(Protocol):
    """A learner rank's side. Every method is called on all ranks at once."""

    def connect(self, workers: Sequence[Any], *, address: str, port: int) -> None:
        """Meet the rollout workers, once, before the first version; at a free port of rank 0 if need be."""

    def publish(self, version: int) -> Publication:
        """Give the current weights a version; buffers are None where `send` brings the bytes."""

    def send(self, version: int) -> None:
        """Commit the version on all workers, who have prepared it."""

    def store(self, version: int) -> Publication:
        """Return the version last published with its bytes, for a worker that missed it."""
