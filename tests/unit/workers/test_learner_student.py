from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opd_ray.config.schema import Dtype, LearnerConfig
from opd_ray.objectives import Losses, ObjectiveOptions, SampledSignal, Tokens
from workers.learner.student import Student, deepspeed_config


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


@pytest.mark.parametrize(
    ("num_gpus", "device", "torch_adam"),
    [(0.0, "none", True), (1.0, "none", True), (0.0, "cpu", True), (1.0, "cpu", False), (1.0, "nvme", False)],
)
def test_the_optimizer_needs_a_compiler_only_where_it_is_offloaded_from_a_gpu(
    num_gpus: float, device: str, torch_adam: bool
):
    over = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    built = deepspeed_config(LearnerConfig(gpus_per_rank=num_gpus, engine_args=over), world_size=1)
    assert built["optimizer"]["params"]["torch_adam"] is torch_adam
    assert built["zero_optimization"]["offload_optimizer"] == {"device": device}
    asked = over | {"optimizer": {"params": {"torch_adam": True}}}
    built = deepspeed_config(LearnerConfig(gpus_per_rank=num_gpus, engine_args=asked), world_size=1)
    assert built["optimizer"]["params"]["torch_adam"] is True


def test_engine_arguments_are_merged_block_by_block_and_win():
    over = {"zero_optimization": {"overlap_comm": True}, "gradient_clipping": 9.0, "wall_clock_breakdown": True}
    built = deepspeed_config(LearnerConfig(zero_stage=1, engine_args=over), world_size=1)
    assert built["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert built["gradient_clipping"] == 9.0
    assert built["wall_clock_breakdown"] is True
    assert over["zero_optimization"] == {"overlap_comm": True}


class ToyModel(nn.Module):
    """A causal LM whose state of a token is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Linear(4, 7, bias=False)
        self.embedding = nn.Embedding(7, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def base_model(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert attention_mask.shape == input_ids.shape
        assert not use_cache
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def toy_losses(options: ObjectiveOptions) -> tuple[Losses, torch.Tensor]:
    """Return the losses of one forward pass over the sequence 1 2 | 3 4 5, and the log-probs at its responses."""
    student, ids = Student(ToyModel()), torch.tensor([3, 4, 5])
    tokens = Tokens(
        ids_N=ids,
        offsets=torch.tensor([0, 3]),
        mask_N=torch.ones(3, dtype=torch.bool),
        weights_N=torch.tensor([1.0, 2.0, 4.0]),
        sampler_logprobs_N=torch.zeros(3),
        advantages_N=torch.zeros(3),
    )
    given = student(
        torch.tensor([1, 2, 3]),
        sequences={
            "input_ids": torch.tensor([[1, 2, 3, 4, 5]]),
            "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        },
        objective="sampled",
        tokens=tokens,
        signal=SampledSignal(logprobs_N=torch.tensor([-1.0, -2.0, -3.0])),
        options=options,
    )
    losses = Losses(**dict(zip((field.name for field in fields(Losses)), given, strict=True)))
    logprobs_NV = student.model.head(student.model.embedding(torch.tensor([2, 3, 4]))).log_softmax(-1)
    losses.loss.backward()
    assert student.head_VD.grad is not None
    return losses, logprobs_NV.detach()


def test_a_forward_pass_gives_the_losses_at_the_states_before_the_response_tokens_in_the_order_of_their_fields():
    losses, logprobs_NV = toy_losses(ObjectiveOptions(vocab_size=7, diagnostic_tokens=2))
    sampled_N = logprobs_NV[torch.arange(3), torch.tensor([3, 4, 5])]
    torch.testing.assert_close(losses.sampled_logprobs_N, sampled_N)
    torch.testing.assert_close(losses.divergence_N, sampled_N - torch.tensor([-1.0, -2.0, -3.0]))
    assert losses.loss.item() == pytest.approx(float((torch.tensor([1.0, 2.0, 4.0]) * losses.loss_N).sum()))
    assert set(losses.diagnostics) == {"student_entropy", "sampled_logprob"}
    assert len(losses.diagnostics["student_entropy"]) == 2


def test_only_the_share_of_tokens_with_the_highest_entropy_has_a_loss_and_the_others_still_count_in_metrics():
    losses, logprobs_NV = toy_losses(ObjectiveOptions(vocab_size=7, entropy_fraction=0.5))
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    kept_N = entropies_N > entropies_N.min()
    weighted_N = torch.tensor([1.0, 2.0, 4.0]) * losses.loss_N * kept_N
    assert losses.loss.item() == pytest.approx(float(weighted_N.sum()))
    assert (losses.divergence_N != 0).all()
