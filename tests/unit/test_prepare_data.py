"""Rows of any file become the records that a run reads; what is left out is counted, what cannot be used is named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from config_files import refusal

from opd_ray.config.data import DataKind
from opd_ray.config.plain import read_command_line
from opd_ray.config.prepare import PrepareConfig
from opd_ray.data import preparation
from opd_ray.data.records import read_records
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.prepare_data import main, run

ROWS = [
    {"question": "What is 1+1? ", "solution": "2", "more": 1},
    {"question": "what  is 1+1?", "solution": "2", "more": 2},
    {"question": "What is 1+1?", "solution": "3", "more": 3},
    {"question": "What is 2+2?", "solution": "four", "more": 4},
    {"question": "  ", "solution": "1", "more": 5},
    {"question": "What is 3+3?", "solution": "#### 6", "more": 6},
]


def source(folder: Path, suffix: str) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".csv":
        path.write_text("question,solution,more\n" + "".join(f'"{r["question"]}",{r["solution"]},1\n' for r in ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def config(folder: Path, *more: str, suffix: str = ".jsonl") -> PrepareConfig:
    given = [f"source={source(folder, suffix)}", f"output={folder}/out/prompts.parquet", "prompt=question"]
    return read_command_line(PrepareConfig, [*given, "answer=solution", *more], usage="")


def records(folder: Path) -> list:
    return read_records(str(folder / "out" / "prompts.parquet"), kind=DataKind.parquet)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_any_kind_gives_the_same_prompts_each_once(tmp_path: Path, suffix: str):
    run(config(tmp_path, "task=numeric", suffix=suffix))
    first, second = records(tmp_path)
    assert first.messages == [{"role": "user", "content": "What is 1+1?"}]
    assert (first.answer, first.task) == ("2", "numeric")
    assert (second.messages[0]["content"], second.answer) == ("What is 3+3?", "#### 6")


def test_what_is_left_out_is_counted():
    given = PrepareConfig(source="", output="x.parquet", prompt="question", answer="solution", task="numeric")
    prepared = preparation.prepare(ROWS, given)
    counts = (prepared.num_read, prepared.num_empty, prepared.num_duplicates, prepared.num_conflicts)
    assert counts == (6, 1, 2, 1)
    assert prepared.num_bad_answers == 1
    assert prepared.first_bad_answer.startswith("row 4: verifier 'numeric' expects an answer that holds a number")


def test_text_stays_text_and_a_template_is_put_around_it(tmp_path: Path):
    run(config(tmp_path, "chat=false", "template=Q: {prompt} {A}", "answer=null"))
    first = records(tmp_path)[0]
    assert (first.prompt, first.messages, first.answer) == ("Q: What is 1+1? {A}", None, None)


def test_chat_messages_are_taken_as_they_are(tmp_path: Path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    pq.write_table(
        pa.Table.from_pylist([{"prompt": chat, "answer": 4}, {"prompt": chat, "answer": 4}]), tmp_path / "c.parquet"
    )
    run(PrepareConfig(source=str(tmp_path / "c.parquet"), output=str(tmp_path / "out" / "prompts.parquet")))
    (record,) = records(tmp_path)
    assert record.messages == chat
    assert record.answer == "4"


def test_lengths_are_those_under_the_models_tokenizer(tmp_path: Path):
    build_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "digits.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("1+2=", "1+2+3+4=", "7=")))
    given = [f"source={rows}", f"output={tmp_path}/o.parquet", "answer=null", "chat=false"]
    table = run(read_command_line(PrepareConfig, [*given, f"model={tmp_path}/model", "max_prompt_tokens=5"], usage=""))
    cells = dict(zip(*(column._cells for column in table.columns), strict=True))
    assert cells["prompt tokens"].startswith("2 to 8, median 4")
    assert cells["longer than max_prompt_tokens=5"] == "1"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["prompt=quest"], "prompt=quest: data.jsonl has no such column, it has question, solution, more"),
        (["answer=a"], "answer=a: data.jsonl has no such column"),
        (["task=maths"], "unknown verifier 'maths'"),
        (["output=out.json"], "expected a name that ends in .parquet"),
        (["template=hello"], "expected {prompt} in it"),
        (["source=/none.jsonl"], "source=/none.jsonl: no such file"),
        (["source=x.txt"], "source=x.txt"),
        (["sauce=x"], "sauce: no such key; did you mean source?"),
        (["chat=maybe"], "chat: "),
        (["question"], "question: expected key=value"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str):
    monkeypatch.setattr(preparation, "HfApi", lambda: Hub([]))
    assert words in refusal(lambda: run(config(tmp_path, *more)))


def test_a_file_that_is_there_is_kept_unless_told_otherwise(tmp_path: Path):
    run(config(tmp_path))
    before = (tmp_path / "out" / "prompts.parquet").read_bytes()
    assert "is there already; overwrite=true replaces it" in refusal(lambda: run(config(tmp_path, "task=numeric")))
    assert (tmp_path / "out" / "prompts.parquet").read_bytes() == before
    run(config(tmp_path, "task=numeric", "overwrite=true"))
    assert records(tmp_path)[0].task == "numeric"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["prompts.parquet"]


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "bad.parquet").write_text("no")
    given = PrepareConfig(source=str(tmp_path / "bad.parquet"), output=str(tmp_path / "o.parquet"))
    assert "bad.parquet: cannot be read as parquet" in refusal(lambda: run(given))


class Hub:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def list_repo_files(self, _: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        return self.names


def test_a_hub_datasets_split_and_subset_are_found_among_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = ["main/train-0.parquet", "main/train-1.parquet"]
    names = ["README.md", wanted[0], "main/test-0.parquet", "other/train-0.parquet", wanted[1]]
    fetched = []

    def fetch(_: str, name: str, *, repo_type: str) -> str:
        fetched.append((name, repo_type))
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"prompt": name, "answer": "1"}]), path)
        return str(path)

    monkeypatch.setattr(preparation, "HfApi", lambda: Hub(names))
    monkeypatch.setattr(preparation, "hf_hub_download", fetch)
    output = tmp_path / "out" / "prompts.parquet"
    run(PrepareConfig(source="who/what", subset="main", output=str(output)))
    assert fetched == [(name, "dataset") for name in wanted]
    assert len(records(tmp_path)) == 2
    none = PrepareConfig(source="who/what", split="dev", output=str(tmp_path / "o.parquet"))
    assert "no file of split=dev; it has main/train-0.parquet" in refusal(lambda: run(none))


def test_the_command_prints_a_table_and_how_to_train_and_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given = [
        f"source={source(tmp_path, '.jsonl')}",
        f"output={tmp_path}/o.parquet",
        "prompt=question",
        "answer=solution",
    ]
    monkeypatch.setattr("sys.argv", ["prepare_data", *given])
    main()
    out = capsys.readouterr().out
    assert "duplicates left out" in out
    assert f"to train on it: data=parquet data.path={tmp_path}/o.parquet" in out
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: output=")


def test_help_lists_every_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["prepare_data", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in PrepareConfig.__dataclass_fields__)
