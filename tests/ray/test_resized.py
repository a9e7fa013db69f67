"""A run goes on with other numbers of workers than it was started with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import run_to_end

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_LIMIT_S = 300
_NAMES = {"train/loss", "eval/reverse_kl"}


def test_a_run_that_is_resumed_on_other_numbers_of_ranks_and_workers_learns_the_same(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Up to the order in which sums are taken."""
    arguments = overrides("save_every=2", "eval_every=2", "learner.zero_stage=0", "deterministic=true", "resume=auto")
    runs = tmp_path / "runs"
    whole = run_to_end([*arguments, "num_steps=4", "name=whole"], run_dir=runs / "whole", limit_s=_LIMIT_S)
    begun = run_to_end([*arguments, "num_steps=2", "name=resized"], run_dir=runs / "resized", limit_s=_LIMIT_S)
    other = ("learner.num_ranks=1", "rollout.num_workers=2", "teacher.num_workers=2", "cluster.num_cpus=5")
    resized = run_to_end(
        [*arguments, "num_steps=4", "name=resized", *other], run_dir=runs / "resized", limit_s=_LIMIT_S
    )
    for outcome in (whole, begun, resized):
        assert outcome.exit_code == 0, outcome.output
    assert resized.steps == whole.steps == [0, 1, 2, 3, 4]
    assert "learner.num_ranks (2 before, 1 now)" in " ".join(resized.output.split())
    expected, found = [
        {
            f"{name} {line['step']}": line[name]
            for line in outcome.rows("metrics.jsonl")
            for name in _NAMES & line.keys()
        }
        for outcome in (whole, resized)
    ]
    assert len(expected) == 7  # losses of four updates, three evaluations
    assert found == pytest.approx(expected, rel=1e-3)
