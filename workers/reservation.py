"""Reserves a place for every worker of a run, and tells what it waits for."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from workers.placement import Pool, capacity, shares_one_gpu

Say = Callable[[str], None]

_FIRST_WORD_S, _WORD_EVERY_S = 3.0, 10.0  # from the start of waiting; between two words
_LOOK_EVERY_S = 0.5
_LAST_LOOKS, _LOOK_AGAIN_S = 6, 0.2


def _say_nothing(_: str) -> None:
    pass


_say: ContextVar[Say] = ContextVar("say", default=_say_nothing)


@contextmanager
def told_to(say: Say) -> Iterator[None]:
    """Within, hand a line to `say` now and then while a reservation waits."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def reserve(all_pools: Sequence[Pool], *, timeout_s: float) -> Any:
    """Return a placement group with one bundle a worker, in the pools' order; of pools that share one GPU, with one
    bundle for all: it lies on one node and its GPU share on one device.

    Raises ValueError when there is no place in time. Nothing stays reserved then, nor when waiting is interrupted.
    """
    shared = shares_one_gpu(all_pools)
    group = placement_group(bundles(all_pools), strategy="STRICT_PACK" if shared else "PACK")
    try:
        _wait(group, all_pools, timeout_s=timeout_s)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def bundles(all_pools: Sequence[Pool]) -> list[dict[str, float]]:
    """Return what the bundles of a placement group hold."""
    one_a_worker = [_resources(pool) for pool in all_pools for _ in range(pool.num_workers)]
    if not shares_one_gpu(all_pools):
        return one_a_worker
    return [{kind: round(sum(b.get(kind, 0) for b in one_a_worker), 4) for kind in ("CPU", "GPU")}]


def _wait(group: Any, all_pools: Sequence[Pool], *, timeout_s: float) -> None:
    ready, start, next_word_s = [group.ready()], time.monotonic(), _FIRST_WORD_S
    while not ray.wait(ready, timeout=min(_LOOK_EVERY_S, timeout_s))[0]:
        passed_s = time.monotonic() - start
        if passed_s >= timeout_s:
            remove_placement_group(group)
            free = _free(num_looks=_LAST_LOOKS)
            raise ValueError(
                f"no place for {_asked(all_pools)} within cluster.placement_timeout_s={timeout_s:g}; the cluster has"
                f" {free}: lower one of these keys or *.cpus_per_*, *.gpus_per_*, wait until other work has left the"
                " cluster, or raise cluster.placement_timeout_s"
            )
        if passed_s >= next_word_s:
            _say.get()(
                f"waiting for a place for {_asked(all_pools)}: the cluster has {_free()}; {passed_s:.0f} of"
                f" {timeout_s:g} s"
            )
            next_word_s += _WORD_EVERY_S


def _asked(all_pools: Sequence[Pool]) -> str:
    by_key = ", ".join(
        f"{pool.key}={pool.num_workers} x {{{', '.join(f'{kind} {n:g}' for kind, n in _resources(pool).items())}}}"
        for pool in all_pools
    )
    num_workers = sum(pool.num_workers for pool in all_pools)
    words = f"{num_workers} worker{'s' if num_workers > 1 else ''} ({by_key})"
    return f"{words} on one GPU" if shares_one_gpu(all_pools) else words


def _free(*, num_looks: int = 1) -> str:
    """Return what is free of the cluster, in words.

    While Ray tries to place a group it counts the group's share as taken, and for a moment after that: the most of
    several looks is free of such tries.
    """
    looks = [ray.available_resources()]
    for _ in range(num_looks - 1):
        time.sleep(_LOOK_AGAIN_S)
        looks.append(ray.available_resources())
    free, present = {kind: max(look.get(kind, 0.0) for look in looks) for kind in ("CPU", "GPU")}, capacity()
    parts = [f"{free.get(kind, 0):g} of {present[kind]:g} {kind}s" for kind in ("CPU", "GPU") if present[kind]]
    return f"{' and '.join(parts) or 'no CPUs'} free"


def _resources(pool: Pool) -> dict[str, float]:
    """Return what one worker needs, as Ray names it."""
    return {"CPU": pool.cpus_per_worker, **({"GPU": pool.gpus_per_worker} if pool.gpus_per_worker else {})}
