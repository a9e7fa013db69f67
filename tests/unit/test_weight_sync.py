import pytest
from config_files import MANDATORY, compose_config, refusal

from opd_ray.config.schema import Config, Dtype
from opd_ray.config.weight_sync import WeightSync
from opd_ray.weight_sync import chosen_sync, published_dtype

EMA = ("teacher=self", "teacher.self.update=ema", "teacher.path=student")


def run(*overrides: str, rollout_gpus: float = 0, learner_gpus: float = 0) -> Config:
    config = compose_config(*MANDATORY, *overrides)
    config.rollout.gpus_per_worker, config.learner.gpus_per_rank = rollout_gpus, learner_gpus
    return config


def asking(sync: WeightSync, *overrides: str, rollout_gpus: float = 0, learner_gpus: float = 0) -> Config:
    config = run(*overrides, rollout_gpus=rollout_gpus, learner_gpus=learner_gpus)
    config.rollout.weight_sync = sync
    return config


@pytest.mark.parametrize(
    ("rollout_gpus", "learner_gpus", "expected"),
    [
        (0, 0, WeightSync.object_store),
        (1, 0, WeightSync.object_store),
        (0, 1, WeightSync.object_store),
        (1, 1, WeightSync.nccl),
        (0.5, 1, WeightSync.nccl),  # the learner's GPU is its own
        (0.6, 0.6, WeightSync.nccl),  # too much for one GPU
        (0.3, 0.5, WeightSync.ipc),
        (0.5, 0.5, WeightSync.ipc),
    ],
)
def test_auto_takes_the_way_that_fits_the_devices(rollout_gpus: float, learner_gpus: float, expected: WeightSync):
    assert chosen_sync(run(rollout_gpus=rollout_gpus, learner_gpus=learner_gpus)) is expected


@pytest.mark.parametrize("gpus", [(0, 0), (1, 1), (0.5, 0.5)])
def test_the_object_store_may_be_asked_for_everywhere(gpus: tuple[float, float]):
    config = asking(WeightSync.object_store, rollout_gpus=gpus[0], learner_gpus=gpus[1])
    assert chosen_sync(config) is WeightSync.object_store


@pytest.mark.parametrize(
    ("sync", "gpus", "words"),
    [
        (
            WeightSync.nccl,
            (0, 0),
            "rollout.gpus_per_worker=0 and learner.gpus_per_rank=0: expected auto or object_store",
        ),
        (
            WeightSync.ipc,
            (0, 0),
            "rollout.gpus_per_worker=0 and learner.gpus_per_rank=0: expected auto or object_store",
        ),
        (
            WeightSync.nccl,
            (1, 0),
            "rollout.gpus_per_worker=1 and learner.gpus_per_rank=0: expected auto or object_store",
        ),
        (
            WeightSync.ipc,
            (1, 1),
            "rollout.gpus_per_worker=1 and learner.gpus_per_rank=1: expected auto or nccl or object_store",
        ),
        (
            WeightSync.nccl,
            (0.4, 0.5),
            "rollout.gpus_per_worker=0.4 and learner.gpus_per_rank=0.5: expected auto or ipc or object_store",
        ),
    ],
)
def test_a_way_that_the_devices_rule_out_is_refused_by_key(sync: WeightSync, gpus: tuple[float, float], words: str):
    config = asking(sync, rollout_gpus=gpus[0], learner_gpus=gpus[1])
    assert refusal(lambda: chosen_sync(config)) == f"rollout.weight_sync={sync.value} with {words}"


def test_an_average_of_the_student_is_fed_from_the_object_store():
    assert chosen_sync(run(*EMA, rollout_gpus=1, learner_gpus=1)) is WeightSync.object_store
    words = refusal(lambda: chosen_sync(asking(WeightSync.nccl, *EMA, rollout_gpus=1, learner_gpus=1)))
    assert words.startswith("rollout.weight_sync=nccl with ")
    assert words.endswith("and teacher.self.update=ema: expected auto or object_store")


def test_a_command_line_that_asks_for_too_much_is_refused_before_anything_starts():
    words = refusal(lambda: compose_config(*MANDATORY, "rollout.weight_sync=nccl"))
    assert words.startswith("rollout.weight_sync=nccl with rollout.gpus_per_worker=0")


@pytest.mark.parametrize(
    ("learner", "rollout", "expected"),
    [
        (Dtype.float32, Dtype.bfloat16, Dtype.bfloat16),
        (Dtype.float32, Dtype.float32, Dtype.float32),
        (Dtype.bfloat16, Dtype.float32, Dtype.bfloat16),
        (Dtype.bfloat16, Dtype.bfloat16, Dtype.bfloat16),
    ],
)
def test_weights_travel_in_the_smaller_type(learner: Dtype, rollout: Dtype, expected: Dtype):
    assert published_dtype(run(f"learner.dtype={learner}", f"rollout.dtype={rollout}")) is expected


def test_weights_that_are_averaged_or_whose_engine_has_a_type_of_its_own_are_not_rounded():
    types = ("learner.dtype=float32", "rollout.dtype=bfloat16")
    assert published_dtype(run(*types, *EMA)) is Dtype.float32
    assert published_dtype(run(*types, "teacher=self", "teacher.path=student")) is Dtype.bfloat16
    assert published_dtype(run(*types, "+rollout.engine_args.dtype=float32")) is Dtype.float32
