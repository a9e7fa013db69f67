"""Recorded hidden states mean something with the head of the teacher that had them, and with no other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from config_files import MANDATORY, compose_config, refusal
from recordings import hidden_score, make_recorded_group, make_scored, record
from safetensors.torch import save_file

from opd_ray.config.schema import Config
from opd_ray.scores import Recording, manifest_of
from workers.scores import check_replay, head_keys


def model(folder: Path, *, seed: int, dtype: torch.dtype = torch.float32, num_rows: int = 20) -> Path:
    folder.mkdir(parents=True)
    head = torch.randn(24, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)[:num_rows].contiguous()
    save_file({"lm_head.weight": head}, folder / "model.safetensors")
    return folder


def recorded(folder: Path, teacher: Path, objective: str) -> Recording:
    config = compose_config(*MANDATORY, f"teacher.path={teacher}", f"objective={objective}")
    recording = record(folder, config, [[make_scored(make_recorded_group(1, 2), hidden_score(3))]])
    known = {"equivalent_ids": (), "head_keys": head_keys(config, vocab_size=14)}
    manifest = manifest_of(config, tokenizer=_Tokenizer(), vocab_size=14, teacher_hidden_size=8, **known)
    return replace(recording, manifest=manifest)


class _Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {}


def offline(recording: Recording, teacher: Path, objective: str) -> Config:
    cache = f"teacher.cache.path={recording.folder}"
    return compose_config(*MANDATORY, "teacher=cache", cache, f"teacher.path={teacher}", f"objective={objective}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_must_be_the_recorded_teachers(tmp_path: Path, dtype: torch.dtype):
    teacher = model(tmp_path / "teacher", seed=1, dtype=dtype)
    recording = recorded(tmp_path / "scores", teacher, "full")
    check_replay(offline(recording, teacher, "full"), recording)
    padded = model(tmp_path / "padded", seed=1, dtype=dtype, num_rows=24)  # only rows that count are compared
    check_replay(offline(recording, padded, "full"), recording)
    other = model(tmp_path / "other", seed=2, dtype=dtype)
    words = refusal(lambda: check_replay(offline(recording, other, "full"), recording))
    assert f"teacher.path={other}: its output head is not that of {teacher}" in words


def test_without_hidden_states_the_teacher_need_not_be_there(tmp_path: Path):
    recording = recorded(tmp_path / "scores", tmp_path / "gone", "support")
    check_replay(offline(recording, tmp_path / "gone", "support"), recording)
