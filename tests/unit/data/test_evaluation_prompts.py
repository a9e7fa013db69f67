"""Which folder an evaluation takes as its model, what it asks, and how long the answers may be."""

from pathlib import Path

import pytest
from config_files import refusal

from opd_ray.config.evaluate import EvaluateConfig
from opd_ray.config.plain import read_command_line
from opd_ray.data.evaluation_prompts import evaluation_prompts, model_folder, response_tokens
from opd_ray.data.models import open_model
from opd_ray.data.tasks import verifier


class Bytes:
    """One id a byte."""

    chat_template = None

    def __call__(self, texts: list[str], **_: object) -> dict[str, list]:
        return {"input_ids": [list(text.encode()) for text in texts]}


def config(*given: str) -> EvaluateConfig:
    return read_command_line(EvaluateConfig, ["model=m", *given], usage="")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("step-000002/MANIFEST.json", "a checkpoint of the learner's shards"),
        ("deepspeed/mp_rank_00_model_states.pt", "a checkpoint of the learner's shards"),
        ("checkpoints/step-000002/MANIFEST.json", "a checkpoint of the learner's shards"),
        ("run/metrics.jsonl", "the run has no export/ yet"),
    ],
)
def test_a_folder_that_no_engine_reads_is_refused_with_what_to_do(tmp_path: Path, file: str, words: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.touch()
    told = refusal(lambda: model_folder(str(tmp_path / Path(file).parts[0])))
    assert words in told
    assert "resume=auto" in told


def test_a_run_dir_stands_for_the_student_that_it_exported(tmp_path: Path):
    (tmp_path / "export").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "export" / "config.json").touch()
    assert model_folder(str(tmp_path)) == str(tmp_path / "export")
    assert model_folder("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    told = refusal(lambda: open_model("model", str(tmp_path)))
    assert told == f"model={tmp_path}: the folder has no tokenizer (tokenizer.json); save the model's with it"


@pytest.mark.parametrize(
    ("asked", "positions", "tokens"),
    [(None, None, 1024), (None, 4096, 1024), (None, 128, 104), (104, 128, 104), (9, None, 9)],
)
def test_responses_are_as_long_as_asked_else_as_the_model_has_room(
    asked: int | None, positions: int | None, tokens: int
):
    given = config("task=sort", *([f"max_response_tokens={asked}"] if asked else []))
    assert response_tokens(given, prompt_tokens=24, positions=positions) == tokens


@pytest.mark.parametrize(("more", "most"), [(["max_response_tokens=105"], 104), (["max_response_tokens=1024"], 104)])
def test_more_than_the_model_has_room_for_is_refused_with_the_most(more: list[str], most: int):
    told = refusal(lambda: response_tokens(config("task=sort", *more), prompt_tokens=24, positions=128))
    assert f"model=m has 128 positions; expected at most {most}" in told
    assert "expected at most 0" in refusal(
        lambda: response_tokens(config("task=sort"), prompt_tokens=200, positions=128)
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["task=sort", "num_samples=0"], "num_samples=0: expected an integer of at least 1"),
        (["task=sort", "temperature=0"], "greedy is measured anyway"),
        (["task=sort", "gpus_per_worker=1", "tensor_parallel_size=2"], "expected 1 to gpus_per_worker=1"),
        (["task=sort", "tensor_parallel_size=0"], "tensor_parallel_size=0"),
        (["task=sort", "num_sample=3"], "num_sample: no such key; did you mean num_samples?"),
        ([], "task is not given"),
    ],
)
def test_a_setting_that_cannot_be_is_named(given: list[str], words: str):
    assert words in refusal(lambda: config(*given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["task=math"], "a verifier needs data=<file> as well"),
        (["task=reasoning_gym/chainsum"], "near it are chain_sum"),
        (["data=/none.jsonl"], "data=/none.jsonl: no such file"),
        (["data={folder}/bad.jsonl"], "bad.jsonl, line 1: not JSON"),
        (["data={folder}/plain.jsonl", "task=maths"], "unknown verifier 'maths'"),
        (["data={folder}/plain.jsonl", "task=numeric"], "expects an answer that holds a number"),
        (["data={folder}/plain.jsonl", "task=reasoning_gym"], "expects an entry as data=reasoning_gym makes them"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(tmp_path: Path, given: list[str], words: str):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "plain.jsonl").write_text('{"prompt": "1+2=", "answer": "three"}\n')
    told = refusal(lambda: evaluation_prompts(config(*(g.format(folder=tmp_path) for g in given)), tokenizer=Bytes()))
    assert words in told
    assert "\n" not in told


@pytest.mark.parametrize("name", ["gcd", "rush_hour"])
def test_a_dataset_is_asked_whether_its_questions_have_one_answer_or_many(name: str):
    prompts = evaluation_prompts(config(f"task=reasoning_gym/{name}", "num_prompts=2"), tokenizer=Bytes())
    assert [(p.task, p.verifier) for p in prompts] == [(name, "reasoning_gym")] * 2
    assert verifier(prompts[0].verifier)("Answer: none", prompts[0].answer) == 0.0
