"""Sees workers that are gone, and ends those that hang: one that gives no sign of life in time is treated as dead."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.lane import DUMP_SIGNAL

_ANSWER_S = 10.0  # for a sign of life once something has failed
_DUMP_S = 2.0  # for a hung process to write its stacks
_LOOKS = 8  # in the time that a worker may be silent
_MAX_LOOK_S = 15.0


class WorkerLost(RuntimeError):
    """Workers are gone, and others may wait for them without end: the pools must be opened anew."""

    def __init__(self, names: list[str], *, cause: RayError) -> None:
        super().__init__(f"lost {', '.join(names)}")
        self.names = names
        self.cause = cause


@contextmanager
def watched(workers: Mapping[str, Any], *, hang_timeout_s: float) -> Iterator[None]:
    """Within, watch workers that are ready, by name.

    Raises WorkerLost for a fault that came from the loss of some of them.
    """
    try:
        places = ray.get([worker.pulse.remote() for worker in workers.values()])
        watch = _Watch(workers, places=dict(zip(workers, places, strict=True)), hang_timeout_s=hang_timeout_s)
        with watch.running():
            yield
    except RayError as fault:
        if names := lost(workers):
            raise WorkerLost(names, cause=fault) from fault
        raise


@contextmanager
def starting() -> Iterator[None]:
    """Within, workers start. Raises WorkerLost when one is gone that did not fail by itself."""
    try:
        yield
    except ActorDiedError as fault:
        if fault.actor_init_failed:
            raise
        raise WorkerLost(["a worker at its start"], cause=fault) from fault


def lost(workers: Mapping[str, Any]) -> list[str]:
    """Return the names of the workers that are dead or give no sign of life."""
    pulses = {worker.pulse.remote(): name for name, worker in workers.items()}
    answered, silent = ray.wait(list(pulses), num_returns=len(pulses), timeout=_ANSWER_S)
    return sorted([pulses[ref] for ref in silent] + [pulses[ref] for ref in answered if _is_dead(ref)])


class _Watch(threading.Thread):
    """Asks every worker for its pulse again and again, and kills one that owes it for too long."""

    def __init__(
        self, workers: Mapping[str, Any], *, places: Mapping[str, tuple[str, int]], hang_timeout_s: float
    ) -> None:
        """places: node and process of each."""
        super().__init__(daemon=True, name="watch")
        self._workers = dict(workers)
        self._places = places
        self._limit_s = hang_timeout_s
        self._done = threading.Event()
        self._asked: dict[str, tuple[Any, float]] = {}  # by name: the reference and when

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self._done.set()
            self.join()

    def run(self) -> None:
        while not self._done.wait(min(self._limit_s / _LOOKS, _MAX_LOOK_S)):
            for name in list(self._workers):
                self._look_at(name)

    def _look_at(self, name: str) -> None:
        if name not in self._asked:
            self._asked[name] = (self._workers[name].pulse.remote(), time.monotonic())
            return
        ref, since = self._asked[name]
        if ray.wait([ref], timeout=0)[0]:
            del self._asked[name]
            if _is_dead(ref):
                del self._workers[name]
        elif time.monotonic() - since > self._limit_s:
            del self._workers[name]
            node, pid = self._places[name]
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            _end.options(scheduling_strategy=there).remote(pid)


def _is_dead(ref: Any) -> bool:
    try:
        ray.get(ref)
    except RayActorError:
        return True
    return False


@ray.remote(num_cpus=0)
def _end(pid: int) -> None:
    """Have a process write its stacks into its log if it still can, and end it. A stopped one ends as well."""
    os.kill(pid, DUMP_SIGNAL)
    time.sleep(_DUMP_S)
    os.kill(pid, signal.SIGKILL)
