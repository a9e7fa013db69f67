"""A learner of adapters under DeepSpeed: what it publishes, changes, saves and writes, against plain torch and peft."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reference_logprobs, reference_model
from learners import GROUPS, exact_scores, full_kl, plain_optimizer, plain_update
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from ranks import Rank, Ranks, Tensors, published_tensors, rank_config
from transformers import AutoModelForCausalLM

from opd_ray.config.student import LoraConfig
from opd_ray.data.lora import adapter_size
from opd_ray.protocol import Score
from workers.learner.worker import LearnerWorker
from workers.weights import WeightManifest

pytestmark = pytest.mark.ray

_LORA = LoraConfig(rank=3, alpha=6.0)
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CUTS = [{"zero_stage": 2, "num_ranks": 1}, {"zero_stage": 3, "num_ranks": 1}, {"zero_stage": 3, "num_ranks": 2}]
_LR = 3.0
_NUM_UPDATES = 3  # A's first gradient is 0, as B is


@dataclass(frozen=True)
class Story:
    """What one learner of adapters did."""

    base_path: str
    teacher_path: str
    manifest: WeightManifest
    published: list[Tensors]  # after so many updates
    frozen: Tensors  # after the last
    resumed: Tensors  # by a worker that did the last one again, from a checkpoint
    checkpoint_bytes: int
    export: Path


@pytest.fixture(scope="module", params=_CUTS, ids=lambda cut: "-".join(map(str, cut.values())))
def story(request: Any, ranks: dict[int, Ranks], model_folder: Any, tmp_path_factory: Any) -> Story:
    folder, cut = tmp_path_factory.mktemp("lora"), request.param
    student, teacher = model_folder(seed=1, tied=True), model_folder(seed=2, hidden_size=128)
    config = rank_config(student=student, teacher=teacher, lora=_LORA, lr=_LR, **cut)
    scores = exact_scores(reference_model(teacher))
    return ranks[cut["num_ranks"]].run(_live, config, scores, folder)


def _live(rank: Rank, scores: list[Score], folder: Path) -> Story:
    """Update, save before the last update, do that one twice, and export."""
    worker = rank.open()
    manifest, _ = worker.publish(0)
    published = [published_tensors(worker)]
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    for update in range(_NUM_UPDATES):
        if update == _NUM_UPDATES - 1:
            worker.save(str(checkpoint))
        rank.update(worker, scores)
        published.append(published_tensors(worker))
    frozen = _frozen(worker)
    worker.export(str(folder / "export"))
    resumed = rank.open()
    resumed.restore(str(checkpoint))
    rank.update(resumed, scores)
    return Story(
        base_path=rank.config.student.path,
        teacher_path=rank.config.teacher.path,
        manifest=manifest,
        published=published,
        frozen=frozen,
        resumed=published_tensors(resumed),
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint.rglob("*.pt")),
        export=folder / "export",
    )


def _frozen(worker: LearnerWorker) -> Tensors:
    """Return the weights under the adapters, by the names they have without."""
    named = [
        (name.replace(".base_layer", ""), p) for name, p in worker._model.named_parameters() if "lora_" not in name
    ]
    with worker._gathered([parameter for _, parameter in named]):
        return {name: parameter.detach().clone() for name, parameter in named}


def _adapted(story: Story, adapters: Tensors) -> PeftModel:
    """Return peft's own model of published adapters on the student's folder."""
    lora = PeftConfig(r=_LORA.rank, lora_alpha=_LORA.alpha, target_modules=_MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(reference_model(story.base_path), lora)
    assert set_peft_model_state_dict(model, adapters).unexpected_keys == []
    return model


def _logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([reference_logprobs(model, group) for group in GROUPS])


def test_a_publication_holds_the_adapters_alone(story: Story) -> None:
    config = AutoModelForCausalLM.from_pretrained(story.base_path).config
    peft_names = {n for n in _adapted(story, {}).state_dict() if "lora_" in n}
    assert {entry.name for entry in story.manifest.entries} == {n.replace(".default", "") for n in peft_names}
    assert story.manifest.num_bytes == adapter_size(config, _LORA).num_bytes
    assert {entry.dtype for entry in story.manifest.entries} == {"float32"}
    assert (story.manifest.lora.rank, story.manifest.lora.alpha) == (_LORA.rank, _LORA.alpha)


def test_updates_are_those_of_torch_on_peft_and_leave_the_weights_underneath_bit_for_bit(story: Story) -> None:
    student, teacher = _adapted(story, story.published[0]), reference_model(story.teacher_path)
    optimizer = plain_optimizer(student, lr=_LR)
    for published in story.published[1:]:
        total, count = full_kl(student, teacher)
        plain_update(optimizer, total / count)
        expected = {n.replace(".default", ""): p.detach() for n, p in student.named_parameters() if p.requires_grad}
        assert published.keys() == expected.keys()
        for name, tensor in published.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)
    first, last = story.published[0], story.published[-1]
    assert min(float((last[name] - first[name]).abs().max()) for name in first) > 1e-3
    for name, parameter in reference_model(story.base_path).named_parameters():
        assert torch.equal(story.frozen[name], parameter), name


def test_a_checkpoint_holds_the_adapters_alone_and_a_restored_learner_goes_on_bit_for_bit(story: Story) -> None:
    assert story.resumed.keys() == story.published[-1].keys()
    for name, tensor in story.resumed.items():
        assert torch.equal(tensor, story.published[-1][name]), name
    assert any(not torch.equal(tensor, story.published[-2][name]) for name, tensor in story.resumed.items())
    in_float32 = 4 * sum(tensor.numel() for tensor in story.frozen.values())
    assert story.checkpoint_bytes < in_float32


def test_the_export_is_the_adapted_model_and_its_adapters_load_with_peft(story: Story) -> None:
    adapted = _logprobs(_adapted(story, story.published[-1]))
    merged = _logprobs(AutoModelForCausalLM.from_pretrained(story.export, dtype=torch.float32).eval())
    loaded = PeftModel.from_pretrained(reference_model(story.base_path), str(story.export / "adapter"))
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    torch.testing.assert_close(_logprobs(loaded), adapted, atol=1e-6, rtol=0)
    assert (adapted - _logprobs(reference_model(story.base_path))).abs().max() > 0.01
    assert json.loads((story.export / "adapter" / "adapter_config.json").read_text())["r"] == _LORA.rank
