"""With batches in flight beyond the one being learned from, every prompt is trained on once, whoever dies meanwhile."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import Outcome, run_to_end

from opd_ray.scores import read_recording
from workers.fault_plan import Action, At, Phase

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_LIMIT_S = 400
_NUM_STEPS, _NUM_PROMPTS = 8, 4
_FAULTS = [
    At(step=step, phase=phase, role=role, index=index, action=Action.sigkill)
    for step, phase, role, index in (
        (2, Phase.generate, "rollout", 1),
        (3, Phase.score, "teacher", 0),
        (5, Phase.backward, "learner", 1),
        (6, Phase.commit, "rollout", 0),
    )
]


def _trained_on(run: Outcome) -> Counter[tuple[int, int]]:
    """Return how often each request was trained on, by its prompt and seed."""
    return Counter((group.prompt_index, group.seed) for group in read_recording(run.run_dir / "scores").groups)


@pytest.mark.parametrize("overprovision", [0.0, 0.5])
def test_every_prompt_is_trained_on_once_through_the_loss_of_workers_of_every_pool(
    overrides: Callable[..., list[str]], tmp_path: Path, overprovision: float
) -> None:
    arguments = overrides(
        f"num_steps={_NUM_STEPS}",
        f"batch.num_prompts={_NUM_PROMPTS}",
        "max_staleness=2",
        f"rollout.overprovision={overprovision}",
        "rollout.num_workers=2",
        "cluster.num_cpus=4",
        "save_every=2",
        "record_scores=true",
        f"eval_every={_NUM_STEPS}",
        "fault.backoff_s=0.1",
    )
    runs = tmp_path / "runs"
    whole = run_to_end([*arguments, "name=whole"], run_dir=runs / "whole", limit_s=_LIMIT_S)
    lossy = run_to_end([*arguments, "name=lossy"], run_dir=runs / "lossy", faults=_FAULTS, limit_s=_LIMIT_S)
    for outcome in (whole, lossy):
        assert outcome.exit_code == 0, outcome.output
        assert outcome.steps == list(range(_NUM_STEPS + 1))
        trained_on = _trained_on(outcome)
        assert len(trained_on) == _NUM_STEPS * _NUM_PROMPTS
        assert set(trained_on.values()) == {1}
    assert len(lossy.struck) == len(_FAULTS)
    assert set(_trained_on(lossy)) == set(_trained_on(whole))
    assert {"worker_restarted", "workers_restarted"} <= set(lossy.events)
