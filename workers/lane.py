"""Which worker this process is, for timelines; and what it answers when it is asked whether it lives."""

import faulthandler
import os
import signal
import time

import ray

LANE = "OPD_RAY_WORKER"  # set where an actor is built
DUMP_SIGNAL = signal.SIGUSR1  # has a worker write the stacks of all its threads into its log


def span_since(start: float) -> tuple[str, float, float]:
    """Return this worker, and from when (Unix seconds) until now it was at something."""
    return os.environ.get(LANE, ""), start, time.time()


def dump_on_signal() -> None:
    """Write the stacks of all threads to stderr whenever the signal for that comes."""
    faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)


def pulse(_: object) -> tuple[str, int]:
    """Return this process's node and number: a worker's sign of life."""
    return ray.get_runtime_context().get_node_id(), os.getpid()
