"""Which worker this process is, for timelines."""

import os
import time

LANE = "OPD_RAY_WORKER"  # set where an actor is built


def span_since(start: float) -> tuple[str, float, float]:
    """Return this worker, and from when (Unix seconds) until now it was at something."""
    return os.environ.get(LANE, ""), start, time.time()
