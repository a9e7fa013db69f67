"""Whole runs with adapters on the real stack: what the learner publishes is what vLLM samples from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import read_lines, run_train
from safetensors.torch import load_file

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_published_adapters_are_what_is_sampled(
    overrides: Callable[..., list[str]], tmp_path: Path, max_staleness: int
) -> None:
    summary, screen = run_train(
        overrides(
            "student.lora.rank=8",
            "learner.num_ranks=1",
            "learner.lr=0.01",
            "num_steps=8",
            f"max_staleness={max_staleness}",
        )
    )
    run_dir = tmp_path / "runs" / "test"
    steps = read_lines(run_dir / "metrics.jsonl")[1:]
    assert len(steps) == 8
    gaps = [metrics["rollout/logprob_gap_max"] for metrics in steps if "rollout/logprob_gap_max" in metrics]
    assert max(gaps) < 1e-5
    assert len(gaps) == 8 or max_staleness > 0
    # the student has moved by much more than that: a sampler that had missed an update would show
    assert summary["reverse_kl_after"] < summary["reverse_kl_before"] - 0.1
    assert "LoRA rank 8" in screen
    exported = load_file(run_dir / "export" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in exported)
    assert json.loads((run_dir / "export" / "adapter" / "adapter_config.json").read_text())["r"] == 8
