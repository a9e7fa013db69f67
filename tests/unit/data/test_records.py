import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from config_files import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_ray.config.data import DataKind
from opd_ray.data.records import Record, read_records

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | JSON, "content": JSON})
ROW = st.fixed_dictionaries(
    {}, optional={"prompt": JSON, "messages": st.lists(MESSAGE, max_size=2) | JSON, "answer": JSON, "task": JSON}
)
SAME_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)


def read_lines(folder: Path, *lines: bytes | str) -> list[Record]:
    raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
    (folder / "prompts.jsonl").write_bytes(b"\n".join(raw))
    return read_records(str(folder / "prompts.jsonl"), kind=DataKind.jsonl)


def read_rows(folder: Path, rows: list[dict], **columns: pa.DataType) -> list[Record]:
    schema = pa.schema(columns) if columns else None
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "prompts.parquet")
    return read_records(str(folder / "prompts.parquet"), kind=DataKind.parquet)


def test_each_line_of_a_jsonl_file_is_a_record_that_knows_its_place(tmp_path: Path):
    first, second = read_lines(
        tmp_path, json.dumps({"prompt": "é+1", "answer": "2", "task": "exact"}), json.dumps({"messages": CHAT})
    )
    path = tmp_path / "prompts.jsonl"
    assert first == Record(where=f"{path}, line 1", prompt="é+1", messages=None, answer="2", task="exact")
    assert second == Record(where=f"{path}, line 2", prompt=None, messages=CHAT, answer=None, task=None)


def test_each_row_of_a_parquet_file_is_a_record_that_knows_its_place(tmp_path: Path):
    rows = [{"prompt": "1+1", "answer": "2", "other": 1.5}, {"prompt": "1+2", "answer": None, "other": 2.5}]
    first, second = read_rows(tmp_path, rows)
    path = tmp_path / "prompts.parquet"
    assert first == Record(where=f"{path}, row 1", prompt="1+1", messages=None, answer="2", task=None)
    assert second == Record(where=f"{path}, row 2", prompt="1+2", messages=None, answer=None, task=None)


def test_a_parquet_file_may_hold_chat_messages(tmp_path: Path):
    (record,) = read_rows(tmp_path, [{"messages": CHAT}])
    assert record.messages == CHAT


def test_rows_are_counted_on_over_the_row_groups_of_a_parquet_file(tmp_path: Path):
    table = pa.Table.from_pylist([{"prompt": str(i)} for i in range(5)])
    pq.write_table(table, tmp_path / "prompts.parquet", row_group_size=2)
    records = read_records(str(tmp_path / "prompts.parquet"), kind=DataKind.parquet)
    assert [(r.prompt, r.where.rpartition(" ")[2]) for r in records] == [(str(i), str(i + 1)) for i in range(5)]


def test_blank_lines_are_passed_over_and_still_counted(tmp_path: Path):
    records = read_lines(tmp_path, '{"prompt": "a"}', "", '{"prompt": "b"}\r', "  ", "")
    assert [record.where.rpartition(" ")[2] for record in records] == ["1", "3"]


@pytest.mark.parametrize("kind", [DataKind.jsonl, DataKind.parquet])
def test_a_missing_file_is_named_with_its_key(tmp_path: Path, kind: DataKind):
    assert refusal(lambda: read_records(str(tmp_path / "no"), kind=kind)) == f"data.path={tmp_path}/no: no such file"


def test_a_folder_is_no_file(tmp_path: Path):
    assert refusal(lambda: read_records(str(tmp_path), kind=DataKind.jsonl)).endswith("no such file")


def test_a_file_without_records_is_refused(tmp_path: Path):
    for empty in (lambda: read_lines(tmp_path, b""), lambda: read_lines(tmp_path, b" \n\n")):
        assert refusal(empty) == f"data.path={tmp_path}/prompts.jsonl: the file holds no records"
    no_rows = refusal(lambda: read_rows(tmp_path, [], prompt=pa.string()))
    assert no_rows == f"data.path={tmp_path}/prompts.parquet: the file holds no records"


def test_a_malformed_line_is_named_with_number_and_column(tmp_path: Path):
    words = refusal(lambda: read_lines(tmp_path, '{"prompt": "a"}', '{"prompt": }'))
    assert words == f"{tmp_path}/prompts.jsonl, line 2: not JSON (Expecting value at column 12)"


def test_a_number_of_too_many_digits_is_refused_with_its_line(tmp_path: Path):
    words = refusal(lambda: read_lines(tmp_path, '{"prompt": "1"}', '{"prompt": "2", "answer": ' + "9" * 5000 + "}"))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: holds a number with too many digits")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path):
    words = refusal(lambda: read_lines(tmp_path, '{"prompt": "a"}', b'{"prompt": "\xff"}'))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: not UTF-8 text")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ("3", "int"), ('"text"', "str"), ("null", "NoneType")])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str, kind: str):
    words = refusal(lambda: read_lines(tmp_path, line))
    assert words.endswith(f"line 1: expected an object with `prompt` or `messages`, got {kind}")


@pytest.mark.parametrize("row", [{"prompt": "a", "messages": CHAT}, {}, {"answer": "4"}])
def test_exactly_one_of_prompt_and_messages_is_expected(tmp_path: Path, row: dict):
    words = refusal(lambda: read_lines(tmp_path, json.dumps(row)))
    assert "line 1: expected exactly one of `prompt` and `messages`" in words


def test_a_parquet_file_without_the_columns_names_its_first_row(tmp_path: Path):
    words = refusal(lambda: read_rows(tmp_path, [{"question": "a"}]))
    assert "row 1: expected exactly one of `prompt` and `messages`" in words


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": 5}, "`prompt` is int, expected text"),
        ({"prompt": ["a"]}, "`prompt` is list, expected text"),
        ({"prompt": "a", "answer": ["4"]}, "`answer` is list, expected text"),
        ({"prompt": "a", "answer": {"x": 4}}, "`answer` is dict, expected text"),
        ({"prompt": "a", "task": 3}, "`task` is int, expected text"),
        ({"messages": "hello"}, "`messages` must be a list of objects with text `role` and `content`"),
        ({"messages": [{"role": "user"}]}, "`messages` must be a list of objects with text `role` and `content`"),
        ({"messages": [{"role": "user", "content": 3}]}, "`messages` must be a list of objects"),
        ({"messages": ["hello"]}, "`messages` must be a list of objects"),
        ({"messages": CHAT[:1]}, "`messages` has no message of role `user`"),
        ({"messages": []}, "`messages` has no message of role `user`"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_file_and_line(tmp_path: Path, row: dict, words: str):
    given = refusal(lambda: read_lines(tmp_path, '{"prompt": "a"}', json.dumps(row)))
    assert given.startswith(f"{tmp_path}/prompts.jsonl, line 2: {words}")


@pytest.mark.parametrize(("answer", "text"), [(4, "4"), (-2.5, "-2.5"), (0, "0")])
def test_a_numeric_answer_becomes_text(tmp_path: Path, answer: float, text: str):
    assert read_lines(tmp_path, json.dumps({"prompt": "a", "answer": answer}))[0].answer == text
    assert read_rows(tmp_path, [{"prompt": "a", "answer": answer}])[0].answer == text


def test_a_truth_value_is_no_number(tmp_path: Path):
    words = refusal(lambda: read_lines(tmp_path, '{"prompt": "a", "answer": true}'))
    assert words.endswith("line 1: `answer` is bool, expected text")


def test_a_byte_order_mark_at_the_start_does_no_harm(tmp_path: Path):
    assert read_lines(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}')[0].prompt == "a"


def test_json_nested_beyond_all_measure_is_refused_not_crashed_on(tmp_path: Path):
    words = refusal(lambda: read_lines(tmp_path, '{"prompt": ' + "[" * 100_000))
    assert "line 1" in words


def test_a_file_of_another_kind_is_no_parquet_file(tmp_path: Path):
    (tmp_path / "prompts.parquet").write_text('{"prompt": "a"}\n' * 3)
    words = refusal(lambda: read_records(str(tmp_path / "prompts.parquet"), kind=DataKind.parquet))
    assert words.startswith(f"{tmp_path}/prompts.parquet: not a readable Parquet file")
    assert "\n" not in words


def test_a_parquet_file_cut_short_is_refused(tmp_path: Path):
    read_rows(tmp_path, [{"prompt": "a" * 50}] * 50)
    path = tmp_path / "prompts.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert "not a readable Parquet file" in refusal(lambda: read_records(str(path), kind=DataKind.parquet))


def check_records_or_a_refusal(path: Path, kind: DataKind) -> None:
    try:
        records, words = read_records(str(path), kind=kind), None
    except ValueError as error:
        records, words = [], str(error)
    assert records or str(path) in words
    for record in records:
        assert str(path) in record.where
        assert (record.prompt is None) != (record.messages is None)


@SAME_FILE
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("kind", [DataKind.jsonl, DataKind.parquet])
def test_any_bytes_are_read_or_refused_by_name(tmp_path: Path, kind: DataKind, content: bytes):
    path = tmp_path / "prompts"
    path.write_bytes(content)
    check_records_or_a_refusal(path, kind)


@SAME_FILE
@given(values=st.lists(JSON | ROW, max_size=3))
def test_any_json_lines_are_read_or_refused_by_name(tmp_path: Path, values: list):
    path = tmp_path / "prompts"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    check_records_or_a_refusal(path, DataKind.jsonl)


@SAME_FILE
@given(position=st.integers(min_value=0, max_value=10_000), value=st.integers(min_value=0, max_value=255))
def test_a_parquet_file_with_a_damaged_byte_is_read_or_refused_by_name(tmp_path: Path, position: int, value: int):
    path = tmp_path / "prompts"
    pq.write_table(pa.Table.from_pylist([{"prompt": "abc", "answer": "4", "messages": None}] * 20), path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    check_records_or_a_refusal(path, DataKind.parquet)
