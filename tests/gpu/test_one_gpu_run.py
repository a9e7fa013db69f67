"""A whole run on one GPU: its engines sleep while the learner updates, and wake with the weights they should have."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import read_lines, run_train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("weight_sync", ["ipc", "object_store"])
def test_engines_sleep_through_every_update_and_sample_with_the_published_weights(
    overrides: Callable[..., list[str]], tmp_path: Path, weight_sync: str
) -> None:
    summary, _ = run_train(
        overrides(
            "cluster=one_gpu",
            "num_steps=3",
            "eval_every=1",
            "learner.num_ranks=1",
            "learner.dtype=float32",
            "rollout.dtype=float32",
            "teacher.dtype=float32",
            f"rollout.weight_sync={weight_sync}",
            "rollout.engine_args.gpu_memory_utilization=0.2",
            "teacher.engine_args.gpu_memory_utilization=0.2",
        )
    )
    assert summary["steps"] == 3
    steps = [line for line in read_lines(tmp_path / "runs" / "test" / "metrics.jsonl") if "time/update_s" in line]
    assert len(steps) == 3
    for step in steps:
        assert step["time/sleep_s"] > 0
        assert step["time/wake_s"] > 0
        assert step["rollout/logprob_gap_max"] < 1e-3
