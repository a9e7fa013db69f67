"""What a learner does to save memory: it computes the same, and gathers and recomputes no more than it must."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import reference_model
from learners import EPS, exact_scores
from ranks import Rank, Ranks, Tensors, published_tensors, rank_config

from opd_ray.config.schema import Config, Dtype
from opd_ray.config.student import LoraConfig
from opd_ray.protocol import Score
from workers.learner.worker import LearnerWorker

pytestmark = pytest.mark.ray

_LORA = LoraConfig(rank=4)
_IN_PARTS = {"stage3_param_persistence_threshold": 0}  # in parts however small they are


@pytest.fixture
def configure(model_folder: Any) -> Any:
    def build(*, tied: bool = False, zero: dict[str, Any] | None = None, **learner: Any) -> Config:
        engine_args = {"optimizer": {"params": {"eps": EPS}}, "zero_optimization": zero or {}}
        folders = {"student": model_folder(seed=1, tied=tied), "teacher": model_folder(seed=2, hidden_size=128)}
        return rank_config(**folders, engine_args=engine_args, **learner)

    return build


@pytest.fixture
def scores(model_folder: Any) -> list[Score]:
    return exact_scores(reference_model(model_folder(seed=2, hidden_size=128)))


@dataclass(frozen=True)
class Updated:
    """What two updates came to."""

    published: Tensors
    calls: Counter[str]  # how often each layer's MLP began: what computes it again may stop inside it
    offloads: tuple[bool, bool]  # optimizer, parameters
    optimizer: str


def _updated(rank: Rank, scores: list[Score]) -> Updated:
    worker, calls = rank.open(), Counter[str]()
    for name, module in worker._model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    for _ in range(2):
        rank.update(worker, scores)
    engine = worker._engine
    return Updated(
        published=published_tensors(worker),
        calls=calls,
        offloads=(bool(engine.zero_use_cpu_optimizer()), engine.zero_offload_param() is not None),
        optimizer=type(engine.basic_optimizer).__name__,
    )


def _assert_equal(tensors: Tensors, expected: Tensors) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("stage", "lora", "offload"),
    [
        (2, None, ["optimizer"]),
        (3, None, ["optimizer"]),
        (3, None, ["optimizer", "param"]),
        (2, _LORA, ["optimizer"]),
        (3, _LORA, ["optimizer", "param"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "lora" if isinstance(value, LoraConfig) else None,
)
def test_offloading_changes_no_update(
    ranks: dict[int, Ranks],
    configure: Any,
    scores: list[Score],
    stage: int,
    lora: LoraConfig | None,
    offload: list[str],
) -> None:
    blocks = {f"offload_{what}": {"device": "cpu"} for what in offload}
    expected = ranks[1].run(_updated, configure(zero_stage=stage, lora=lora), scores)
    updated = ranks[1].run(_updated, configure(zero_stage=stage, lora=lora, zero=blocks), scores)
    assert expected.offloads == (False, False)
    assert updated.offloads == (True, "param" in offload)
    assert updated.optimizer == "AdamW"  # torch's: nothing is compiled
    _assert_equal(updated.published, expected.published)


@pytest.mark.parametrize(("stage", "lora"), [(2, None), (3, None), (2, _LORA), (3, _LORA)])
def test_layers_computed_twice_give_the_same_updates(
    ranks: dict[int, Ranks], configure: Any, scores: list[Score], stage: int, lora: LoraConfig | None
) -> None:
    once = ranks[1].run(_updated, configure(zero_stage=stage, lora=lora), scores)
    twice = ranks[1].run(_updated, configure(zero_stage=stage, lora=lora, gradient_checkpointing=True), scores)
    _assert_equal(twice.published, once.published)
    assert min(once.calls.values()) > 0
    assert twice.calls == {name: 2 * count for name, count in once.calls.items()}


def _gathers(rank: Rank, scores: list[Score]) -> tuple[int, int, int]:
    """Return how often the head and the first layer's MLP were gathered in an update, and its micro-batches."""
    worker = rank.open()
    rank.update(worker, scores)  # in which DeepSpeed learns the order of modules
    counts = _count_gathers(worker)
    micro_batches = []
    worker._engine.module.register_forward_pre_hook(lambda *_: micro_batches.append(1))
    rank.update(worker, scores)
    return counts["head"], counts["mlp"], len(micro_batches)


def _count_gathers(worker: LearnerWorker) -> Counter[str]:
    counts = Counter[str]()
    watched = {
        worker._engine.module.head_VD.ds_id: "head",
        worker._model.get_submodule("model.layers.0.mlp.down_proj").weight.ds_id: "mlp",
    }

    def counting(gather: Any) -> Any:
        def count(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            counts.update(watched[p.ds_id] for p in parameters if p.ds_id in watched)
            return gather(parameters, *args, **kwargs)

        return count

    for parameter in worker._model.parameters():
        parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
    return counts


@pytest.mark.parametrize(
    ("cut", "zero", "times"),
    [
        ({"num_ranks": 1, "tied": False}, {}, 1),
        ({"num_ranks": 1, "tied": True}, {}, 1),
        ({"num_ranks": 2, "tied": False}, {}, 1),
        ({"num_ranks": 1, "tied": False}, {"stage3_max_reuse_distance": 0}, 2),  # not kept until the backward pass
    ],
    ids=["one rank", "tied", "two ranks", "kept no longer than needed"],
)
def test_a_head_in_parts_is_gathered_once_a_micro_batch_in_however_many_chunks(
    ranks: dict[int, Ranks], configure: Any, scores: list[Score], cut: dict[str, Any], zero: dict[str, int], times: int
) -> None:
    config = configure(zero=_IN_PARTS | zero, zero_stage=3, **cut)
    for chunk_tokens in (1, 64):
        config.objective.chunk_tokens = chunk_tokens
        heads, mlps, micro_batches = ranks[cut["num_ranks"]].run(_gathers, config, scores)
        assert micro_batches > 1
        assert heads == times * micro_batches
        assert mlps >= micro_batches


def _in_bfloat16(rank: Rank, scores: list[Score]) -> tuple[Tensors, Tensors, Tensors]:
    """Return the adapters before and after an update, and the weights under them."""
    worker = rank.open()
    before = published_tensors(worker)
    for _ in range(2):
        rank.update(worker, scores)
    named = {name.replace(".base_layer", ""): parameter for name, parameter in worker._model.named_parameters()}
    with worker._gathered(list(named.values())):
        frozen = {name: parameter.detach().clone() for name, parameter in named.items() if "lora_" not in name}
    return before, published_tensors(worker), frozen


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_on_bfloat16_weights_are_trained_in_float32(
    ranks: dict[int, Ranks], configure: Any, scores: list[Score], model_folder: Any, stage: int
) -> None:
    config = configure(zero_stage=stage, lora=_LORA, dtype=Dtype.bfloat16)
    before, after, frozen = ranks[1].run(_in_bfloat16, config, scores)
    for name, tensor in after.items():
        assert tensor.dtype is torch.float32
        assert not torch.equal(tensor, before[name]), name
        assert not torch.equal(tensor, tensor.bfloat16().float()), name
    for name, parameter in reference_model(model_folder(seed=1)).named_parameters():
        assert torch.equal(frozen[name], parameter.bfloat16()), name
