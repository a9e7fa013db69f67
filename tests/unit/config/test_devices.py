from dataclasses import replace

import pytest
from config_files import MANDATORY, compose_config, refusal

from opd_ray.config.devices import check_devices

ONE_GPU = (*MANDATORY, "cluster=one_gpu")


def refused(*overrides: str) -> str:
    words = refusal(lambda: compose_config(*overrides))
    assert "\n" not in words
    return words


def test_one_gpu_is_shared_by_engines_that_sleep_and_the_learner():
    config = compose_config(*ONE_GPU)
    shares = (config.rollout.gpus_per_worker, config.teacher.gpus_per_worker, config.learner.gpus_per_rank)
    assert all(0 < share < 1 for share in shares)
    assert round(sum(shares), 4) == 1
    for pool in (config.rollout, config.teacher):
        assert pool.engine_args["enable_sleep_mode"] is True
        assert pool.engine_args["gpu_memory_utilization"] == pool.gpus_per_worker
    assert config.cluster.sleep
    assert not compose_config(*MANDATORY, "cluster=gpus").cluster.sleep


@pytest.mark.parametrize("share", ["-0.5", "2", "1.5"])
def test_a_rank_has_no_more_than_one_gpu(share: str):
    words = refused(*MANDATORY, f"learner.gpus_per_rank={share}")
    assert words.startswith(f"learner.gpus_per_rank={float(share)}: expected 0, 1 or a part of a GPU between them")
    assert "learner.num_ranks" in words


@pytest.mark.parametrize("share", ["0", "0.25", "1"])
def test_a_rank_may_have_a_part_of_a_gpu(share: str):
    assert compose_config(*MANDATORY, f"learner.gpus_per_rank={share}").learner.gpus_per_rank == float(share)


def test_two_ranks_cannot_be_on_one_gpu():
    two = (*MANDATORY, "learner.num_ranks=2")
    words = refused(*two, "learner.gpus_per_rank=0.5")
    assert words.startswith("learner.gpus_per_rank=0.5 with learner.num_ranks=2: expected one rank")
    compose_config(*two, "learner.gpus_per_rank=0.6")


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (("max_staleness=1",), "cluster.sleep=true with max_staleness=1: engines that work ahead are never idle"),
        (("rollout.gpus_per_worker=0",), "cluster.sleep=true with rollout.gpus_per_worker=0: vLLM engines sleep"),
        (("teacher.gpus_per_worker=1",), "cluster.sleep=true with teacher.gpus_per_worker=1: vLLM engines sleep"),
        (("learner.gpus_per_rank=0",), "cluster.sleep=true with learner.gpus_per_rank=0: vLLM engines sleep"),
        (("rollout.num_workers=2",), "cluster.sleep=true with rollout.num_workers=2: expected 1"),
        (
            ("teacher.engine_args.enable_sleep_mode=false",),
            "cluster.sleep=true with teacher.engine_args.enable_sleep_mode=False: expected true",
        ),
        (
            ("rollout.gpus_per_worker=0.5",),
            "cluster.sleep=true with rollout.gpus_per_worker=0.5, teacher.gpus_per_worker=0.3,"
            " learner.gpus_per_rank=0.35: expected at most 1 in all",
        ),
        (
            ("rollout.engine_args.gpu_memory_utilization=0.7",),
            "rollout.engine_args.gpu_memory_utilization=0.7 and teacher.engine_args.gpu_memory_utilization=0.3: ",
        ),
    ],
)
def test_sleep_is_refused_where_engines_are_never_idle_or_share_no_gpu(overrides: tuple[str, ...], start: str):
    assert refused(*ONE_GPU, *overrides).startswith(start)


def test_fixed_batches_and_sleep_do_not_go_together():
    words = refusal(lambda: check_devices(replace(compose_config(*ONE_GPU), deterministic=True)))
    assert words.startswith("cluster.sleep=true with deterministic=true: ")


def test_an_engine_on_cpus_cannot_sleep():
    words = refused(*MANDATORY, "cluster=local", "cluster.sleep=true")
    assert words.startswith("cluster.sleep=true with rollout.gpus_per_worker=0: vLLM engines sleep on a GPU")
    assert "cluster.sleep=false" in words


def test_an_engine_must_say_how_much_of_the_memory_it_takes():
    args = "rollout.engine_args={enable_sleep_mode: true}"
    words = refused(*MANDATORY, "cluster=one_gpu", f"+{args}", "~rollout.engine_args.gpu_memory_utilization")
    assert words.startswith("rollout.engine_args.gpu_memory_utilization is not given")
    told = ("~rollout.engine_args.gpu_memory_utilization", "+rollout.engine_args.kv_cache_memory_bytes=1000000000")
    compose_config(*ONE_GPU, *told)


def test_every_teacher_of_several_is_looked_at_and_one_elsewhere_is_not():
    entry = "gpus_per_worker: 0.2, engine_args: {gpu_memory_utilization: 0.2}"
    words = refused(*ONE_GPU, f"+teachers={{sort: {{path: a, {entry}}}}}")
    assert words.startswith("cluster.sleep=true with teachers.sort.engine_args.enable_sleep_mode=None: expected true")
    compose_config(*ONE_GPU, "teacher=http", "teacher.http.urls=[http://127.0.0.1:1/v1]", "objective=sampled")
