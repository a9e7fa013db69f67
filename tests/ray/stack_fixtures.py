"""Tiny models and isolated clusters for tests of the real stack."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_ray.data.tiny_models import build_tokenizer

ModelFolder = Callable[..., str]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Return a function that writes a random model: the same arguments give the same folder."""
    root = tmp_path_factory.mktemp("models")

    def build(*, seed: int = 0, hidden_size: int = 64, tied: bool = False) -> str:
        folder = root / f"seed{seed}-width{hidden_size}-tied{tied}"
        if not folder.exists():
            write_model(folder, seed=seed, hidden_size=hidden_size, tied=tied)
        return str(folder)

    return build


def write_model(folder: Path, *, seed: int, hidden_size: int, tied: bool) -> None:
    """Write a random model of two layers, and its tokenizer."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far from uniform, so that a wrong weight shows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def overrides(tmp_path: Path, model_folder: ModelFolder) -> Callable[..., list[str]]:
    """Return a function that gives the overrides of a run: two steps on random models, in a runs folder of its own."""

    def build(*more: str) -> list[str]:
        student, teacher = model_folder(seed=1), model_folder(seed=2, hidden_size=128)
        return [*run_overrides(tmp_path / "runs", student=student, teacher=teacher), *more]

    return build


def run_overrides(runs_dir: Path, *, student: str, teacher: str) -> list[str]:
    """Return the overrides of a run: two steps on tiny models."""
    return [
        "name=test",
        "num_steps=2",
        f"runs_dir={runs_dir}",
        f"student.path={student}",
        f"teacher.path={teacher}",
        "data.task=sort",
        "data.num_prompts=64",
        "data.max_prompt_tokens=24",
        "batch.num_prompts=4",
        "rollout.samples_per_prompt=2",
        "rollout.max_response_tokens=8",
        "objective=full",
        "learner.num_ranks=2",
        "learner.lr=0.01",
        "learner.max_tokens_per_micro_batch=64",
        "eval.num_prompts=4",
        "tracking=none",
    ]


@pytest.fixture(autouse=True)
def no_cluster_left() -> Iterator[None]:
    """Leave no Ray cluster behind, whatever a test does."""
    import ray

    yield
    ray.shutdown()
