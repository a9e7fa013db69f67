import socket
from dataclasses import replace

import pytest
from config_files import compose_config, refusal

from opd_ray.config.services import ClusterConfig
from workers.placement import Pool, connect, is_local, pools, shares_one_gpu, teacher_role
from workers.reservation import bundles


def test_each_role_has_a_pool_of_its_own_size_and_needs():
    config = compose_config(
        "experiment=demo",
        "rollout.num_workers=3",
        "rollout.gpus_per_worker=0.5",
        "teacher.num_workers=2",
        "teacher.cpus_per_worker=1.5",
        "learner.num_ranks=4",
        "learner.cpus_per_rank=2",
        "learner.gpus_per_rank=1",
    )
    assert pools(config) == {
        "rollout": Pool(key="rollout.num_workers", num_workers=3, cpus_per_worker=0.5, gpus_per_worker=0.5),
        "teacher": Pool(key="teacher.num_workers", num_workers=2, cpus_per_worker=1.5, gpus_per_worker=0.0),
        "learner": Pool(key="learner.num_ranks", num_workers=4, cpus_per_worker=2.0, gpus_per_worker=1.0),
    }


def test_every_teacher_has_a_pool_and_those_that_tasks_share_have_one():
    two = compose_config("experiment=demo_multi", "teachers.copy.num_workers=3", "teachers.sort.gpus_per_worker=1")
    assert list(pools(two)) == ["rollout", "teacher-sort", "teacher-copy", "learner"]
    assert pools(two)["teacher-sort"] == Pool(
        key="teachers.sort.num_workers", num_workers=1, cpus_per_worker=0.25, gpus_per_worker=1.0
    )
    assert (pools(two)["teacher-copy"].key, pools(two)["teacher-copy"].num_workers) == ("teachers.copy.num_workers", 3)
    shared = replace(two, teachers={"sort": two.teachers["sort"], "copy": two.teachers["sort"]})
    assert list(pools(shared)) == ["rollout", "teacher-sort", "learner"]


def test_two_cpus_are_enough_for_the_demo_of_two_teachers():
    config = compose_config("experiment=demo_multi")
    assert sum(pool.num_workers * pool.cpus_per_worker for pool in pools(config).values()) <= 2


def test_the_role_of_a_teachers_workers_has_its_name():
    assert teacher_role("teacher") == "teacher"
    assert teacher_role("sort") == "teacher-sort"


def test_the_pools_come_in_the_order_of_the_placement_groups_bundles():
    assert list(pools(compose_config("experiment=demo"))) == ["rollout", "teacher", "learner"]


def test_every_worker_has_a_bundle_of_its_own_and_those_that_share_a_gpu_have_one_together():
    two = pools(compose_config("experiment=demo", "learner.gpus_per_rank=1"))
    assert bundles(list(two.values())) == [{"CPU": 0.5}, {"CPU": 0.5}, *[{"CPU": 0.5, "GPU": 1.0}] * 2]
    one = pools(compose_config("experiment=demo", "cluster=one_gpu", "learner.num_ranks=1"))
    assert bundles(list(one.values())) == [{"CPU": 3.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [((0.35, 0.3, 0.35), True), ((0.0, 0.5, 0.5), True), ((0.5,), False), ((1.0, 0.0), False), ((0.6, 0.6), False)],
)
def test_workers_share_one_gpu_when_all_their_parts_make_up_no_more(parts: tuple[float, ...], expected: bool):
    of_pool = [Pool(key="k", num_workers=1, cpus_per_worker=1.0, gpus_per_worker=part) for part in parts]
    assert shares_one_gpu(of_pool) is expected


@pytest.mark.parametrize(
    ("address", "variable", "expected"),
    [(None, None, True), ("auto", None, False), (None, "10.0.0.1:6379", False), ("auto", "10.0.0.1:6379", False)],
)
def test_a_run_brings_its_own_cluster_unless_an_address_is_given(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, expected: bool
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert is_local(ClusterConfig(address=address)) is expected


@pytest.mark.parametrize("given_by", ["cluster.address", "RAY_ADDRESS"])
def test_an_address_at_which_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, given_by: str):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    config = ClusterConfig(address=address if given_by == "cluster.address" else None)
    words = refusal(lambda: connect(config))
    assert words.startswith(f"{given_by}={address}: no Ray cluster answers there")
    assert "\n" not in words
