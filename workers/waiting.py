"""Waits for workers' answers, but never without end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

_limit_s: float | None = None  # None: no limit


@contextmanager
def waiting_at_most(limit_s: float) -> Iterator[None]:
    """Within, no answer of a worker is waited for longer, on any thread of this process."""
    global _limit_s
    before, _limit_s = _limit_s, limit_s
    try:
        yield
    finally:
        _limit_s = before


def answers(refs: Any) -> Any:
    """Return what one reference or a list of them holds, as `ray.get`. Raises GetTimeoutError after the limit."""
    return ray.get(refs, timeout=_limit_s)


def finished(refs: Sequence[Any], *, num_refs: int) -> list[Any]:
    """Return as many references as are asked for once they can be read. Raises GetTimeoutError after the limit."""
    ready, _ = ray.wait(list(refs), num_returns=num_refs, timeout=_limit_s, fetch_local=False)
    if len(ready) < num_refs:
        raise GetTimeoutError(f"{num_refs - len(ready)} of {num_refs} answers are owed for {_limit_s:g} s")
    return list(ready)
