from pathlib import Path
from typing import Any

import pytest
import torch

from workers.learner.saving import EngineSaver


class Writer:
    """Stands for DeepSpeed's checkpoint engine."""

    def save(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)


class Engine:
    """Writes its weights in a file as DeepSpeed's engine does, then has a call in common with other ranks."""

    def __init__(self) -> None:
        self.checkpoint_engine = Writer()
        self.global_steps = 1
        self.weights = {"layers": [torch.ones(3)], "step": 1}
        self.calls_in_common = 0

    def save_checkpoint(self, folder: str, **_: Any) -> None:
        self.checkpoint_engine.save(self.weights, f"{folder}/weights.pt")
        self.calls_in_common += 1


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_written_is_the_state_at_the_call_whatever_follows(tmp_path: Path, in_background: bool):
    engine = Engine()
    saver = EngineSaver(engine, exclude_frozen=False)
    saver.save(str(tmp_path), in_background=in_background)
    engine.weights["layers"][0].zero_()
    engine.weights["step"] = 2
    saver.wait()
    written = torch.load(tmp_path / "weights.pt")
    assert written["step"] == 1
    assert torch.equal(written["layers"][0], torch.ones(3))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_rank_that_cannot_write_says_so_after_the_calls_in_common(tmp_path: Path, in_background: bool):
    engine = Engine()
    saver = EngineSaver(engine, exclude_frozen=False)
    missing = str(tmp_path / "missing")
    if in_background:
        saver.save(missing, in_background=True)
        with pytest.raises(OSError, match=r"weights\.pt: .*missing"):
            saver.wait()
        saver.wait()  # told once
    else:
        with pytest.raises(OSError, match=r"weights\.pt: .*missing"):
            saver.save(missing, in_background=False)
    assert engine.calls_in_common == 1
