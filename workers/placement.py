"""Joins or starts the Ray cluster, and says what a run's workers need of it."""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from opd_ray.config.schema import Config
from opd_ray.config.services import ClusterConfig
from opd_ray.routing import DEFAULT_TEACHER, teachers_of

_CONNECT_TIMEOUT_S = 10.0
_NOTICE = "A worker died or was killed while executing a task"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The workers of one kind and what each of them needs."""

    key: str  # configuration key that sizes the pool, for messages
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float


def pools(config: Config) -> dict[str, Pool]:
    """Return the pools of a run by role."""
    rollout, learner, teachers = config.rollout, config.learner, teachers_of(config).by_name
    return {
        "rollout": Pool(
            key="rollout.num_workers",
            num_workers=rollout.num_workers,
            cpus_per_worker=rollout.cpus_per_worker,
            gpus_per_worker=rollout.gpus_per_worker,
        ),
        **{
            teacher_role(name): Pool(
                key=f"teachers.{name}.num_workers" if config.teachers else "teacher.num_workers",
                num_workers=teacher.num_workers,
                cpus_per_worker=teacher.cpus_per_worker,
                gpus_per_worker=teacher.gpus_per_worker,
            )
            for name, teacher in teachers.items()
        },
        "learner": Pool(
            key="learner.num_ranks",
            num_workers=learner.num_ranks,
            cpus_per_worker=learner.cpus_per_rank,
            gpus_per_worker=learner.gpus_per_rank,
        ),
    }


def teacher_role(name: str) -> str:
    """Return the role of a teacher's workers."""
    return name if name == DEFAULT_TEACHER else f"{DEFAULT_TEACHER}-{name}"


def is_local(config: ClusterConfig) -> bool:
    """Whether the run brings its own cluster, on this machine's loopback."""
    return config.address is None and "RAY_ADDRESS" not in os.environ


def connect(config: ClusterConfig) -> str | None:
    """Join the cluster at `cluster.address` or RAY_ADDRESS; without either start one in this process.

    Returns where its dashboard listens, or None without one.

    Raises ValueError when there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _leave_out_notices()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if is_local(config):
        ray.init("local", num_cpus=config.num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        return None
    key, address = ("cluster.address", config.address) if config.address else ("RAY_ADDRESS", os.environ["RAY_ADDRESS"])
    try:
        _check_answers(address)
        return ray.init(address, **quiet).dashboard_url or None
    except (OSError, ConnectionError) as error:
        raise ValueError(
            f"{key}={address}: no Ray cluster answers there ({error}); expected host:port of a head node,"
            " `auto` on a machine of the cluster, or null for a cluster of this process"
        ) from None


def _leave_out_notices() -> None:
    """Keep what Ray prints of a worker that is gone off the console: the run tells of it itself, by the worker's name.

    What the tasks that are asked again were told has a setting; that the worker died has none, and is in Ray's own log.
    """
    os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")
    ray_driver: Any = ray._private.worker
    shown = ray_driver.print_to_stdstream
    if getattr(shown, "__module__", "") == __name__:
        return

    def show(data: dict[str, Any], *more: Any, **named: Any) -> None:
        if not any(line.startswith(_NOTICE) for line in data["lines"]):
            shown(data, *more, **named)

    ray_driver.print_to_stdstream = show


def _check_answers(address: str) -> None:
    """Raise OSError unless something listens at a host:port; Ray itself would try for minutes."""
    if "://" in address:
        raise OSError("a job server or client address")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def check_capacity(all_pools: Sequence[Pool]) -> None:
    """Raise ValueError when the workers ask for more CPUs or GPUs than the whole cluster has."""
    available = capacity()
    for resource, needed in totals(all_pools).items():
        present = available[resource]
        if needed > present:
            asked = ", ".join(f"{p.key}={p.num_workers} x {_share(p, resource):g}" for p in all_pools)
            raise ValueError(
                f"the run asks for {needed:g} {resource}s and the cluster has {present:g} ({asked}): lower one of"
                f" these or {'the *.cpus_per_* keys' if resource == 'CPU' else 'use a larger cluster'}, or say"
                " cluster.may_grow=true where an autoscaler adds nodes"
            )


def capacity() -> dict[str, float]:
    """Return the CPUs and GPUs of the whole connected cluster."""
    resources = ray.cluster_resources()
    return {resource: resources.get(resource, 0) for resource in ("CPU", "GPU")}


def totals(all_pools: Sequence[Pool]) -> dict[str, float]:
    """Return the CPUs and GPUs that the pools ask for together."""
    return {r: sum(p.num_workers * _share(p, r) for p in all_pools) for r in ("CPU", "GPU")}


def shares_one_gpu(all_pools: Sequence[Pool]) -> bool:
    """Whether the workers with GPUs, several, ask for parts of a GPU that make up no more than one: they share it."""
    shares = [pool.gpus_per_worker for pool in all_pools for _ in range(pool.num_workers) if pool.gpus_per_worker]
    return len(shares) > 1 and max(shares) < 1 and round(sum(shares), 4) <= 1


def _share(pool: Pool, resource: str) -> float:
    return pool.cpus_per_worker if resource == "CPU" else pool.gpus_per_worker
