"""The Ray actors; the only home of vLLM and DeepSpeed. `open_fleets` is the door of a run; the others open one pool."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from opd_ray.config.schema import Config
from workers.health import LearnerOutOfMemory, WorkerLost
from workers.learner.fleet import MustRollBack
from workers.measuring import learner_alone, model_sampler, reference_logprobs, teacher_sampler, teacher_scorer
from workers.opening import WorkerClasses, open_fleets
from workers.placement import capacity, check_capacity, connect, is_local, pools, totals
from workers.reservation import told_to
from workers.scores import check_replay, head_keys, training_fleets
from workers.teacher.fleet import check_teachers

__all__ = [
    "LearnerOutOfMemory",
    "MustRollBack",
    "WorkerClasses",
    "WorkerLost",
    "capacity",
    "check_replay",
    "check_teachers",
    "connected",
    "head_keys",
    "is_local",
    "learner_alone",
    "model_sampler",
    "open_fleets",
    "pools",
    "reference_logprobs",
    "teacher_sampler",
    "teacher_scorer",
    "totals",
    "training_fleets",
]


@contextmanager
def connected(config: Config, say: Callable[[str], None] = lambda _: None) -> Iterator[str | None]:
    """Join or start the Ray cluster, check that the run fits it, and leave it at the end; yields its dashboard's URL.

    say: takes a line now and then while workers wait for their place. Raises ValueError when there is no cluster or it
    is too small and may not grow.
    """
    dashboard_url = connect(config.cluster)
    try:
        if not config.cluster.may_grow:
            check_capacity(list(pools(config).values()))
        with told_to(say):
            yield dashboard_url
    finally:
        ray.shutdown()
