from pathlib import Path
from typing import Any

import pytest

from opd_ray.resuming import _folder_sha256, check_facts

FACTS: dict[str, Any] = {
    "num_ranks": 2,
    "zero_stage": 2,
    "tokenizer": "t",
    "teachers": {"teacher": {"path": "models/teacher", "sha256": "m"}},
    "data_sha256": "d",
    "config": {"num_steps": 4, "learner": {"lr": 1e-6, "engine_args": {}}, "resume": "never"},
}


def now(**changed: Any) -> dict[str, Any]:
    return {**FACTS, **changed}


def test_the_same_run_goes_on_without_a_word():
    assert check_facts(FACTS, now(), where="step-2") == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_ranks": 4}, r"learner.num_ranks=4: step-2 was written with learner.num_ranks=2.*expected .*num_ranks=2"),
        ({"zero_stage": 3}, r"learner.zero_stage=3: step-2 was written with learner.zero_stage=2"),
        ({"tokenizer": "u"}, "student.path: step-2 was written with another tokenizer"),
    ],
)
def test_what_a_checkpoint_cannot_be_loaded_into_is_refused_by_key(changed: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        check_facts(FACTS, now(**changed), where="step-2")


def test_without_partitions_any_number_of_ranks_goes_on_but_not_at_another_stage():
    written = now(zero_stage=0)
    assert check_facts(written, now(zero_stage=0, num_ranks=4), where="step-2") == []
    with pytest.raises(ValueError, match="was written with 0; expected 0"):
        check_facts(written, now(zero_stage=2, num_ranks=2), where="step-2")


def test_other_data_and_other_settings_are_told_by_key_but_not_those_that_a_longer_run_changes():
    config = {"num_steps": 9, "learner": {"lr": 2e-6, "engine_args": {"x": 1}}, "resume": "auto"}
    data, settings = check_facts(FACTS, now(data_sha256="e", config=config), where="step-2")
    assert data == "data: the training prompts are not those that step-2 was trained on"
    assert settings.startswith("the configuration is not that of step-2: learner.engine_args ({} before, None now), ")
    assert "learner.lr (1e-06 before, 2e-06 now)" in settings
    assert "num_steps" not in settings
    assert "resume" not in settings


def test_a_teacher_whose_files_have_changed_is_told_of_and_one_of_an_older_checkpoint_or_another_path_is_not():
    changed = {"teacher": {"path": "models/teacher", "sha256": "n"}}
    assert check_facts(FACTS, now(teachers=changed), where="step-2") == [
        "teacher: the model in models/teacher is not the one that step-2 learned from"
    ]
    assert check_facts(now(teachers={"teacher": "models/teacher"}), now(), where="step-2") == []
    assert check_facts(FACTS, now(teachers={"teacher": {"path": "b", "sha256": "n"}}), where="step-2") == []


def test_the_hash_of_a_model_is_of_its_settings_and_the_sizes_of_its_files(tmp_path: Path):
    def write(settings: str, weights: bytes) -> str | None:
        (tmp_path / "config.json").write_text(settings)
        (tmp_path / "model.safetensors").write_bytes(weights)
        return _folder_sha256(tmp_path)

    assert write("{}", b"ab") == write("{}", b"ab")
    assert len({write("{}", b"ab"), write("[]", b"ab"), write("{}", b"abc")}) == 3
    assert _folder_sha256(tmp_path / "org" / "model") is None


def test_many_changes_are_counted():
    config = {f"key{i}": i for i in range(9)}
    (words,) = check_facts({**FACTS, "config": {}}, now(config=config), where="step-2")
    assert words.endswith("key4 (None before, 4 now) and 4 more")
