"""Waiting for a place on a real Ray cluster: what is said meanwhile, and what is left when there is none."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from helpers import compose_config
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd_ray.doctor import examine
from opd_ray.preflight import Status
from workers.placement import Pool
from workers.reservation import reserve, told_to

pytestmark = pytest.mark.ray

_DEADLINE_S = 120
_SHORT_S = 4  # longer than until the first word
_POOLS = [
    Pool(key="rollout.num_workers", num_workers=2, cpus_per_worker=0.5, gpus_per_worker=0.0),
    Pool(key="learner.num_ranks", num_workers=1, cpus_per_worker=0.5, gpus_per_worker=1.0),
]
_WAITED_FOR = (
    "3 workers (rollout.num_workers=2 x {CPU 0.5}, learner.num_ranks=1 x {CPU 0.5, GPU 1}): the cluster has 0 of 2 CPUs"
    " and 2 of 2 GPUs free; 3 of 120 s"
)


def _part(share: float) -> Pool:
    return Pool(key="rollout.num_workers", num_workers=1, cpus_per_worker=0.1, gpus_per_worker=share)


@pytest.fixture
def _cluster() -> Iterator[None]:
    """Start a cluster of 2 CPUs that believes it has 2 GPUs."""
    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def _hold(*bundles: dict[str, float]) -> Any:
    """Take a place of the cluster for other work."""
    group = placement_group(list(bundles))
    assert group.wait(_DEADLINE_S)
    return group


def _pending() -> list[str]:
    return [state["placement_group_id"] for state in placement_group_table().values() if state["state"] == "PENDING"]


@pytest.mark.usefixtures("_cluster")
def test_a_run_waits_with_words_for_other_work_to_leave_and_has_its_place_then() -> None:
    other, words = _hold({"CPU": 2}), []

    def say(line: str) -> None:
        words.append(line)
        remove_placement_group(other)

    with told_to(say):
        group = reserve(_POOLS, timeout_s=_DEADLINE_S)
    assert words == [f"waiting for a place for {_WAITED_FOR}"]
    assert group.bundle_specs == [{"CPU": 0.5}, {"CPU": 0.5}, {"CPU": 0.5, "GPU": 1.0}]
    assert group.wait(1)


@pytest.mark.usefixtures("_cluster")
def test_at_the_deadline_the_error_says_what_was_asked_what_is_free_and_which_keys_to_change() -> None:
    _hold({"CPU": 2})
    words: list[str] = []
    with pytest.raises(ValueError, match="no place for ") as refusal, told_to(words.append):
        reserve(_POOLS, timeout_s=_SHORT_S)
    text = str(refusal.value)
    assert text.startswith(
        "no place for 3 workers (rollout.num_workers=2 x {CPU 0.5}, learner.num_ranks=1 x {CPU 0.5, GPU 1}) within"
        f" cluster.placement_timeout_s={_SHORT_S}; the cluster has 0 of 2 CPUs and 2 of 2 GPUs free: lower one of these"
    )
    assert "raise cluster.placement_timeout_s" in text
    assert "\n" not in text
    assert len(words) == 1
    assert _pending() == []


@pytest.mark.usefixtures("_cluster")
def test_an_interrupted_reservation_leaves_nothing_pending() -> None:
    _hold({"CPU": 2})

    def interrupt(_: str) -> None:
        assert len(_pending()) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), told_to(interrupt):
        reserve(_POOLS, timeout_s=_DEADLINE_S)
    assert _pending() == []


@pytest.mark.usefixtures("_cluster")
def test_workers_that_share_a_gpu_see_the_same_one_and_are_never_spread_over_two() -> None:
    halves = _hold({"GPU": 0.5, "CPU": 0.1}, {"GPU": 0.6, "CPU": 0.1})  # one of each GPU
    with pytest.raises(ValueError, match=r"GPU 0.4\}\) on one GPU within .* 0.9 of 2 GPUs free"):
        reserve([_part(0.3), _part(0.4)], timeout_s=1)
    remove_placement_group(halves)
    _hold({"GPU": 0.2, "CPU": 0.1})
    group = reserve([_part(0.35), _part(0.3), _part(0.35)], timeout_s=_DEADLINE_S)

    @ray.remote
    class Worker:
        def sees(self) -> tuple[str, str]:
            import os

            return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]

    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=0)
    sharers = [Worker.options(num_gpus=p, num_cpus=0.1, scheduling_strategy=place).remote() for p in (0.35, 0.3, 0.35)]
    assert len(set(ray.get([sharer.sees.remote() for sharer in sharers], timeout=_DEADLINE_S))) == 1


@pytest.mark.slow
def test_a_run_larger_than_a_cluster_that_may_grow_waits_and_ends_as_a_mistake_of_the_users(
    overrides: Callable[..., list[str]],
) -> None:
    too_large = overrides("cluster.num_cpus=1", "rollout.cpus_per_worker=2", f"cluster.placement_timeout_s={_SHORT_S}")
    refused = _train(too_large)
    assert refused.returncode == 2
    assert "error: the run asks for 3.5 CPUs and the cluster has 1" in refused.stderr
    assert "cluster.may_grow=true where an autoscaler adds nodes" in refused.stderr
    assert "waiting for a place" not in refused.stdout

    waited = _train([*too_large, "cluster.may_grow=true", "resume=overwrite"])
    assert waited.returncode == 2
    assert "waiting for a place for 4 workers (rollout.num_workers=1 x {CPU 2}" in waited.stdout
    assert waited.stderr.startswith("error: no place for 4 workers (rollout.num_workers=1 x {CPU 2}, ")
    assert len(waited.stderr.splitlines()) == 1


def test_the_doctor_says_in_yellow_that_the_cluster_must_grow(overrides: Callable[..., list[str]]) -> None:
    config = compose_config(overrides("cluster.num_cpus=1", "rollout.cpus_per_worker=2", "cluster.may_grow=true"))
    (found,) = [finding for finding in examine(config, engines=False) if finding.name == "cluster"]
    assert found.status is Status.warning
    assert found.found == "the run asks for 3.5 of 1 CPUs, 0 of 0 GPUs"


def _train(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "opd_ray.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
