"""Gives a published version to rollout workers: to all of them or, when one cannot take it, to none."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opd_ray.protocol import WeightBundle
from workers.waiting import answers


def deliver(workers: Sequence[Any], weights: WeightBundle, turns: Sequence[Any] | None = None) -> float:
    """Prepare a version on every worker, then commit it on all; return the seconds of the commit.

    When one cannot prepare, its error is raised and all go on with the version they have. When one fails to commit, it
    takes no further step until it has loaded a whole version. turns: the place of the commit in each worker's canonical
    order; None: at once.
    """
    places = turns if turns is not None else [None] * len(workers)
    pairs = zip(workers, places, strict=True)
    answers([worker.prepare.remote(weights.manifest, weights.buffer, turn) for worker, turn in pairs])
    start = time.perf_counter()
    if weights.senders:
        answers([rank.send.remote(weights.version) for rank in weights.senders])
    else:
        answers([worker.commit.remote(weights.version) for worker in workers])
    return time.perf_counter() - start


def stored(weights: WeightBundle) -> WeightBundle:
    """Return a version whose bytes are in the object store. Raises RuntimeError when the learner has gone on since."""
    if not weights.senders:
        return weights
    pairs = [rank.store.options(num_returns=2).remote(weights.version) for rank in weights.senders]
    manifest, buffer = pairs[0]
    return replace(weights, manifest=manifest, buffer=buffer, senders=())


def catch_up(workers: Sequence[Any], weights: WeightBundle) -> int:
    """Give a version, through the object store, to the workers that do not hold it; return how many that were."""
    versions = answers([worker.held_version.remote() for worker in workers])
    behind = [worker for worker, held in zip(workers, versions, strict=True) if held != weights.version]
    if behind:
        deliver(behind, stored(weights))
    return len(behind)
