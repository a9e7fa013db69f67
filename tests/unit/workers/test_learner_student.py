import pytest

from opd_ray.config.schema import Dtype, LearnerConfig
from workers.learner.student import deepspeed_config


def test_the_learners_keys_reach_deepspeed():
    config = LearnerConfig(
        zero_stage=3, lr=2e-5, beta1=0.8, beta2=0.99, weight_decay=0.1, max_grad_norm=0.5, dtype=Dtype.bfloat16
    )
    built = deepspeed_config(config, world_size=4)
    assert built["train_batch_size"] == 4 * built["train_micro_batch_size_per_gpu"]
    assert built["zero_optimization"] == {"stage": 3}
    assert built["gradient_clipping"] == 0.5
    assert built["bf16"] == {"enabled": True}
    params = built["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["weight_decay"]) == (2e-5, [0.8, 0.99], 0.1)


@pytest.mark.parametrize("num_gpus", [0.0, 1.0])
def test_the_optimizer_needs_no_compiler(num_gpus: float):
    built = deepspeed_config(LearnerConfig(gpus_per_rank=num_gpus), world_size=1)
    assert built["optimizer"]["params"]["torch_adam"] is True


def test_engine_arguments_are_merged_block_by_block_and_win():
    over = {"zero_optimization": {"overlap_comm": True}, "gradient_clipping": 9.0, "wall_clock_breakdown": True}
    built = deepspeed_config(LearnerConfig(zero_stage=1, engine_args=over), world_size=1)
    assert built["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert built["gradient_clipping"] == 9.0
    assert built["wall_clock_breakdown"] is True
    assert over["zero_optimization"] == {"overlap_comm": True}
