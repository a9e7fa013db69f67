import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from config_files import refusal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_ray.config.schema import TeacherConfig
from opd_ray.data.models import check_same_tokens, inspect_models
from opd_ray.data.tiny_models import build_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random model with more rows than tokens."""
    return save_model(tmp_path_factory.mktemp("models") / "whole", vocab_size=32, hidden_size=16)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the model without the files of the given names."""

    def copy_without(*names: str) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        for name in names:
            (folder / name).unlink()
        return folder

    return copy_without


def save_model(folder: Path, *, vocab_size: int, hidden_size: int) -> Path:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def tokenizer_of(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)))


def inspect(student: Path | str, teacher: Path | str):
    return inspect_models(student_path=str(student), teachers={"teacher.path": TeacherConfig(path=str(teacher))})


def test_two_models_of_one_tokenizer_give_the_rows_that_both_heads_have(whole: Path, tmp_path: Path):
    smaller = save_model(tmp_path / "smaller", vocab_size=20, hidden_size=24)
    models = inspect(whole, smaller)
    assert models.vocab_size == inspect(smaller, whole).vocab_size == 20
    assert models.teacher_hidden_size == 24
    assert models.tokenizer("1+2")["input_ids"] == [1, 10, 2]


def test_of_several_teachers_the_rows_are_those_that_all_heads_have_and_the_width_is_the_largest(
    whole: Path, tmp_path: Path
):
    paths = {"a": (20, 24), "b": (26, 8)}
    teachers = {
        f"teachers.{name}.path": TeacherConfig(
            path=str(save_model(tmp_path / name, vocab_size=vocab_size, hidden_size=hidden_size))
        )
        for name, (vocab_size, hidden_size) in paths.items()
    }
    models = inspect_models(student_path=str(whole), teachers=teachers)
    assert (models.vocab_size, models.teacher_hidden_size) == (20, 24)


def test_of_several_teachers_the_one_at_fault_is_named_by_its_key(whole: Path, damaged: Callable[..., Path]):
    folder = damaged("config.json")
    teachers = {
        "teachers.sort.path": TeacherConfig(path=str(whole)),
        "teachers.copy.path": TeacherConfig(path=str(folder)),
    }
    words = refusal(lambda: inspect_models(student_path=str(whole), teachers=teachers))
    assert words.startswith(f"teachers.copy.path={folder}: the folder has no config.json")
    words = refusal(lambda: check_same_tokens(tokenizer_of("a"), tokenizer_of("b"), key="teachers.copy.path"))
    assert words.startswith("student.path and teachers.copy.path have different token maps: 1 of 1 ids differ")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_folder_is_named_by_its_key(whole: Path, tmp_path: Path, role: str):
    paths = {"student": whole, "teacher": whole, role: tmp_path / "no"}
    words = refusal(lambda: inspect(**paths))
    assert words.startswith(f"{role}.path={tmp_path}/no: no such folder")
    assert "\n" not in words


def test_a_hub_name_that_is_not_in_the_cache_is_named_by_its_key(whole: Path):
    words = refusal(lambda: inspect("nobody/nothing-of-the-kind", whole))
    assert words.startswith("student.path=nobody/nothing-of-the-kind: no such folder, and not found on the Hugging Fa")
    assert "\n" not in words


def test_a_file_in_the_place_of_a_folder_is_refused(whole: Path):
    words = refusal(lambda: inspect(whole / "config.json", whole))
    assert words == f"student.path={whole}/config.json: is a file, expected a Hugging Face folder"


def test_a_folder_without_a_configuration_is_refused(damaged: Callable[..., Path], whole: Path):
    folder = damaged("config.json")
    words = refusal(lambda: inspect(whole, folder))
    assert words == f"teacher.path={folder}: the folder has no config.json, expected a Hugging Face model folder"


def test_a_folder_without_safetensors_is_refused(damaged: Callable[..., Path], whole: Path):
    folder = damaged("model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    words = refusal(lambda: inspect(folder, whole))
    assert words == f"student.path={folder}: the folder has no *.safetensors, expected weights in that format"


def test_a_folder_without_a_tokenizer_is_refused(damaged: Callable[..., Path], whole: Path):
    folder = damaged("tokenizer.json", "tokenizer_config.json")
    words = refusal(lambda: inspect(folder, whole))
    assert words == f"student.path={folder}: the folder has no tokenizer (tokenizer.json); save the model's with it"


@pytest.mark.parametrize("content", ["{", "[]", '"text"', '{"model": 3}', ""])
def test_a_tokenizer_that_cannot_be_read_is_refused(damaged: Callable[..., Path], whole: Path, content: str):
    folder = damaged("tokenizer_config.json")
    (folder / "tokenizer.json").write_text(content)
    words = refusal(lambda: inspect(folder, whole))
    assert words.startswith(f"student.path={folder}: the tokenizer cannot be loaded")
    assert "\n" not in words


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-model"}'])
def test_a_configuration_that_cannot_be_read_is_refused(damaged: Callable[..., Path], whole: Path, content: str):
    folder = damaged("config.json")
    (folder / "config.json").write_text(content)
    words = refusal(lambda: inspect(whole, folder))
    assert words.startswith(f"teacher.path={folder}: ")
    assert "\n" not in words


def test_the_first_ids_that_differ_are_named_and_all_are_counted():
    student, teacher = tokenizer_of("a", "b", "c", "d", "e"), tokenizer_of("a", "c", "b", "x", "f")
    words = refusal(lambda: check_same_tokens(student, teacher))
    assert "4 of 5 ids differ" in words
    assert "id 1 is 'b' to the student and 'c' to the teacher; id 2 is 'c'" in words
    assert "id 3 is 'd' to the student and 'x' to the teacher" in words
    assert "id 4" not in words


def test_an_id_that_only_one_tokenizer_has_is_a_difference():
    words = refusal(lambda: check_same_tokens(tokenizer_of("a"), tokenizer_of("a", "b")))
    assert "1 of 2 ids differ (id 1 is None to the student and 'b' to the teacher)" in words


def test_equal_token_maps_pass_whatever_their_order_in_memory():
    check_same_tokens(tokenizer_of("a", "b"), tokenizer_of("a", "b"))


def test_models_of_different_tokenizers_are_refused_before_any_worker_starts(damaged: Callable[..., Path], whole: Path):
    folder = damaged()
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = 2, 1
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    words = refusal(lambda: inspect(whole, folder))
    assert words.startswith("student.path and teacher.path have different token maps: 2 of 14 ids differ (id 1 is '1'")
