import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_ray.config.schema import TinyModelConfig
from opd_ray.data.tasks import TASKS
from opd_ray.data.tiny_models import _encode, _examples, _with_noise, build_tiny_model, build_tokenizer, is_built

SPEC = TinyModelConfig(num_layers=1, hidden_size=32, num_heads=1, num_steps=3, batch_size=4)


def ignore_step(*_report: float) -> None:
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "deeper" / "tiny"
    build_tiny_model(path, spec=SPEC, on_step=ignore_step)
    return path


def test_the_tokenizer_gives_one_token_per_character_and_its_way_back():
    tokenizer = build_tokenizer()
    ids = tokenizer("7+3=37")["input_ids"]
    assert ids == [7, 10, 3, 11, 3, 7]
    assert tokenizer.decode(ids) == "7+3=37"
    assert (
        tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == "7+3=37"
    )


def test_every_example_of_every_task_survives_the_tokenizer():
    tokenizer = build_tokenizer()
    for task in TASKS.values():
        for example in task.examples(num_examples=20, seed=0):
            text = example.prompt + example.answer
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_model_of_several_tasks_is_shown_them_in_turn_and_of_each_the_first_examples():
    spec = replace(SPEC, tasks=["sort", "copy"], seed=4)
    shown = _examples(spec, num_examples=5)
    for first, task in enumerate(spec.tasks):
        of_task = shown[first::2]
        assert of_task == TASKS[task].examples(num_examples=len(of_task), seed=4)


def test_a_model_of_one_task_is_shown_its_examples_alone():
    assert _examples(SPEC, num_examples=5) == TASKS["sort"].examples(num_examples=5, seed=0)


def test_a_model_of_two_tasks_is_built_and_known_by_both(tmp_path: Path):
    spec = replace(SPEC, tasks=["sort", "copy"])
    build_tiny_model(tmp_path / "tiny", spec=spec, on_step=ignore_step)
    assert is_built(tmp_path / "tiny", spec)
    assert not is_built(tmp_path / "tiny", SPEC)


def test_only_the_answer_and_the_end_carry_labels():
    tokenizer = build_tokenizer()
    (example,) = TASKS["sort"].examples(num_examples=1, seed=0)
    input_ids_BT, labels_BT = _encode([example], tokenizer=tokenizer)
    assert input_ids_BT.shape == labels_BT.shape == (1, 24 + 13)
    assert (labels_BT[0, :24] == -100).all()
    assert tokenizer.decode(labels_BT[0, 24:]) == example.answer + "<eos>"
    assert torch.equal(input_ids_BT[0, 24:], labels_BT[0, 24:])


def test_noise_touches_a_tenth_of_the_answer_and_none_of_the_prompt():
    input_ids_BT, labels_BT = _encode(TASKS["sort"].examples(num_examples=500, seed=0), tokenizer=build_tokenizer())
    torch.manual_seed(0)
    is_changed_BT = _with_noise(input_ids_BT, labels_BT=labels_BT) != input_ids_BT
    assert not is_changed_BT[:, :24].any()
    assert 0.07 < is_changed_BT[:, 24:].float().mean() < 0.11  # a tenth of the random digits are the right ones


def test_transformers_loads_a_built_model_and_its_tokenizer(built: Path):
    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 12
    assert tokenizer.decode(tokenizer("1+2=12")["input_ids"]) == "1+2=12"
    output = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=3)
    assert output.shape[1] > 4


@pytest.mark.parametrize("tied_embeddings", [False, True])
def test_embeddings_are_tied_as_asked(tmp_path: Path, tied_embeddings: bool):
    build_tiny_model(tmp_path / "tiny", spec=replace(SPEC, tied_embeddings=tied_embeddings), on_step=ignore_step)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied_embeddings


def test_a_built_model_is_known_by_its_spec_and_its_files(built: Path):
    assert is_built(built, SPEC)
    assert not is_built(built, replace(SPEC, seed=1))
    assert not is_built(built.parent / "absent", SPEC)
    assert json.loads((built / "tiny_model.json").read_text())["hidden_size"] == 32


def test_a_folder_that_lacks_a_file_is_not_built(tmp_path: Path):
    build_tiny_model(tmp_path / "tiny", spec=SPEC, on_step=ignore_step)
    (tmp_path / "tiny" / "model.safetensors").unlink()
    assert not is_built(tmp_path / "tiny", SPEC)


def test_nothing_but_the_model_is_left_beside_it(built: Path):
    assert list(built.parent.iterdir()) == [built]


def test_an_interrupted_build_leaves_the_old_model_whole(tmp_path: Path):
    path = tmp_path / "tiny"
    build_tiny_model(path, spec=SPEC, on_step=ignore_step)

    def interrupt(*_report: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_tiny_model(path, spec=replace(SPEC, seed=1), on_step=interrupt)
    assert is_built(path, SPEC)


def test_a_model_of_another_spec_is_replaced(tmp_path: Path):
    path = tmp_path / "tiny"
    build_tiny_model(path, spec=SPEC, on_step=ignore_step)
    build_tiny_model(path, spec=replace(SPEC, seed=1), on_step=ignore_step)
    assert is_built(path, replace(SPEC, seed=1))


def test_an_unknown_task_is_refused_with_the_known_ones(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'sorting': expected one of sort, copy; change \*\.build\.tasks"):
        build_tiny_model(tmp_path / "tiny", spec=replace(SPEC, tasks=["sort", "sorting"]), on_step=ignore_step)


def test_a_folder_made_by_someone_else_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no tiny_model"):
        build_tiny_model(tmp_path, spec=SPEC, on_step=ignore_step)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_same_spec_builds_the_same_weights_and_leaves_the_callers_generator_alone(built: Path, tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_tiny_model(tmp_path / "again", spec=SPEC, on_step=ignore_step)
    assert torch.equal(torch.rand(1), expected)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_every_step_is_reported_with_a_loss_that_starts_near_a_blind_guess(tmp_path: Path):
    reports: list[tuple[int, int, float]] = []
    build_tiny_model(tmp_path / "tiny", spec=SPEC, on_step=lambda *report: reports.append(report))
    assert [report[:2] for report in reports] == [(1, 3), (2, 3), (3, 3)]
    assert 1.0 < reports[0][2] < 6.0
