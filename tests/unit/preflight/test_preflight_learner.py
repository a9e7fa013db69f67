from typing import Any

import pytest

from opd_ray.config.schema import Dtype, LearnerConfig
from opd_ray.preflight.learner import TrainedSize, checkpoint_bytes, export_bytes, training_bytes

WHOLE = TrainedSize(num_parameters=1_000_000)
ADAPTERS = TrainedSize(num_parameters=1_000_000, num_adapters=10_000)


def held(size: TrainedSize, **learner: Any) -> int:
    return training_bytes(LearnerConfig(**learner), size)


@pytest.mark.parametrize("dtype", Dtype)
def test_all_that_is_trained_takes_16_bytes_in_either_type(dtype: Dtype):
    assert held(WHOLE, dtype=dtype) == 16_000_000


@pytest.mark.parametrize(("stage", "expected"), [(0, 16.0), (1, 4 + 12 / 4), (2, 4 + 12 / 4), (3, 16 / 4)])
def test_ranks_share_the_optimizers_state_from_stage_1_and_the_weights_at_stage_3(stage: int, expected: float):
    assert held(WHOLE, dtype=Dtype.float32, zero_stage=stage, num_ranks=4) == expected * 1_000_000


def test_under_adapters_the_weights_have_no_gradient_and_no_state():
    assert held(ADAPTERS, dtype=Dtype.bfloat16) == 2 * 1_000_000 + 16 * 10_000
    assert held(ADAPTERS, dtype=Dtype.float32) == 4 * 1_000_000 + 16 * 10_000
    assert held(ADAPTERS, dtype=Dtype.bfloat16, zero_stage=3, num_ranks=4) == 500_000 + 40_000
    assert checkpoint_bytes(ADAPTERS) == 16 * 10_000
    assert export_bytes(LearnerConfig(dtype=Dtype.bfloat16), ADAPTERS) == 2 * 1_000_000 + 4 * 10_000


def test_what_is_offloaded_leaves_a_gpu_and_stays_in_a_cpu_machines_memory():
    def offloaded(*what: str, num_gpus: float = 1.0, device: str = "cpu") -> int:
        blocks = {f"offload_{name}": {"device": device} for name in what}
        return held(WHOLE, zero_stage=3, gpus_per_rank=num_gpus, engine_args={"zero_optimization": blocks})

    assert offloaded("optimizer") == 4_000_000  # bfloat16 weights and gradients
    assert offloaded("optimizer", "param") == 2_000_000
    assert offloaded("optimizer", device="none") == 16_000_000
    assert offloaded("optimizer", "param", num_gpus=0) == 16_000_000
