"""Weights through Ray's object store: one copy on the learner's side, none on the workers'.

Ray copies the buffers of a method's result straight into its store, before the rank's next call. Parameters that are
rounded to a smaller type or gathered (ZeRO-3) are written once more before; those on a GPU are first brought down.
"""

from collections.abc import Sequence
from typing import Any

from workers.sync.backend import Publication
from workers.sync.source import StudentWeights
from workers.weights import published


class ObjectStorePublisher:
    """`Publisher` whose buffers are the bytes themselves: a worker commits what it has prepared."""

    def __init__(self, weights: StudentWeights, *, rank: int) -> None:
        self._weights = weights
        self._rank = rank

    def connect(self, workers: Sequence[Any], *, address: str, port: int) -> None:
        """Nothing is to be agreed on."""

    def publish(self, version: int) -> Publication:
        """Return all weights on rank 0; in one process, what is returned shares the learner's memory."""
        if self._rank > 0:
            for _ in self._weights:
                pass
            return None, None
        return published(self._weights, version=version, lora=self._weights.lora)

    def send(self, version: int) -> None:
        """The workers hold the bytes already."""
        raise RuntimeError(f"version {version} is in the object store: its workers commit it themselves")

    def store(self, version: int) -> Publication:
        """Return the current weights, as `publish`."""
        return self.publish(version)
