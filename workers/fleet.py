"""Starts the actors of a pool, each in its place and with its output in a log file of its own, and ends them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from workers.lane import LANE, dump_on_signal, pulse
from workers.placement import Pool

_Item = TypeVar("_Item")

_HEALTH = "health"  # concurrency group
_MAX_CONCURRENT_CALLS = 100_000  # back-pressure is the schedule's task, not the actor's

_ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor's process
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_ENV = {
    "DS_ACCELERATOR": "cpu",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles its sampler's helpers even when eager: 20 s and a C++ compiler
}
_GPU_ENV = {"DS_ACCELERATOR": "cuda"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Berth:
    """Where a pool's workers live: bundles of the placement group, and the run's log folder."""

    role: str
    pool: Pool
    placement_group: Any
    first_bundle: int = 0
    one_bundle: bool = False  # all workers live in the first; else each has one of its own
    log_dir: Path
    num_threads: int  # CPU threads of torch; 0: its own choice
    local: bool  # everything on this machine's loopback

    def log_file(self, index: int) -> Path:
        """Return where a worker's output goes."""
        return self.log_dir / f"{self.role}-{index}.log"

    def bundle(self, index: int) -> int:
        """Return the bundle that a worker lives in."""
        return self.first_bundle + (0 if self.one_bundle else index)


def spawn(
    worker_class: type, *, berth: Berth, arguments: dict[str, Any], concurrent: bool, max_restarts: int = 0
) -> list[Any]:
    """Start a pool's actors with the same arguments and return their handles at once.

    A concurrent worker has an async interface and takes all calls as they come; another takes them in order.
    max_restarts: how often Ray starts one that is gone anew, in its place; it then gets what it owes once more.
    """
    # A worker that takes its calls in order gives its sign of life beside them.
    remote = ray.remote if concurrent else ray.remote(concurrency_groups={_HEALTH: 1})
    sign = _pulse_among if concurrent else _pulse_beside
    return [
        remote(_logged(worker_class, berth.log_file(index), pulse=sign))
        .options(
            name=f"{berth.role}-{index}",
            num_cpus=berth.pool.cpus_per_worker,
            num_gpus=berth.pool.gpus_per_worker,
            runtime_env={"env_vars": _environment(berth)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=berth.placement_group, placement_group_bundle_index=berth.bundle(index)
            ),
            **({"max_concurrency": _MAX_CONCURRENT_CALLS} if concurrent else {}),
            **({"max_restarts": max_restarts, "max_task_retries": -1} if max_restarts else {}),
        )
        .remote(**arguments)
        for index in range(berth.pool.num_workers)
    ]


def spawn_here(worker_class: type, *, name: str, log_dir: Path, arguments: dict[str, Any]) -> Any:
    """Start one light actor on the driver's own machine, outside every pool, and return its handle at once.

    It reads and writes files where the driver sees them, and takes its calls in order.
    """
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_logged(worker_class, log_dir / f"{name}.log"))
    return actor.options(name=name, num_cpus=0, scheduling_strategy=node).remote(**arguments)


def in_calls(items: Sequence[_Item], most: int, *, num_workers: int) -> list[Sequence[_Item]]:
    """Cut items into calls of at most so many each, in order; fewer where some worker would get none."""
    size = min(most, -(-len(items) // num_workers))
    return [items[start : start + size] for start in range(0, len(items), max(size, 1))]


def kill(actors: Sequence[Any]) -> None:
    """End actors at once."""
    for actor in actors:
        ray.kill(actor)


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, those of C libraries too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _logged(worker_class: type, log_file: Path, *, pulse: Any = pulse) -> type:
    """Return the class with its output redirected before it is built; workers themselves know of no logs."""

    def build(self: Any, **arguments: Any) -> None:
        redirect_output(log_file)
        os.environ[LANE] = log_file.stem
        dump_on_signal()
        worker_class.__init__(self, **arguments)

    name = log_file.stem  # Ray quotes an actor's repr in its errors
    return type(worker_class.__name__, (worker_class,), {"__init__": build, "__repr__": lambda _: name, "pulse": pulse})


# Ray's decorator marks the function itself: each has one of its own. A pulse that is owed is not asked for again.
@ray.method(max_task_retries=0)
def _pulse_among(worker: object) -> tuple[str, int]:
    return pulse(worker)


@ray.method(max_task_retries=0, concurrency_group=_HEALTH)
def _pulse_beside(worker: object) -> tuple[str, int]:
    return pulse(worker)


def _environment(berth: Berth) -> dict[str, str]:
    environment = dict(_ENGINE_ENV)
    environment |= _CPU_ENV if berth.pool.gpus_per_worker == 0 else _GPU_ENV
    if berth.num_threads > 0:
        environment["OMP_NUM_THREADS"] = str(berth.num_threads)
    if berth.local:
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    return environment
