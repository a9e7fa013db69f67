"""What a reader's tokens stand for, with one real tokenizer of each kind."""

import pytest
from alignment_tokenizers import CORPUS, LLAMA, NORMALISING, TEACHER, TEACHERS, TEXTS, UNIGRAM, ids_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd_ray.data.alignment import Piece
from opd_ray.data.rereading import Reading, TextReader
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.data.token_text import token_bytes

TABLES = {name: token_bytes(tokenizer) for name, tokenizer in TEACHERS.items()}
READERS = {name: TextReader(tokenizer) for name, tokenizer in TEACHERS.items()}


def stands_for(reading: Reading, written: list[Piece]) -> list[bytes]:
    """The written bytes that each token stands for, a unit as one byte."""
    text = b"".join(b"#" if isinstance(piece, int) else piece for piece in written)
    return [text[a:b] for a, b in zip(reading.text.starts_N, reading.text.ends_N, strict=True)]


def left_out(reading: Reading) -> list[int]:
    told = {p for a, b in zip(reading.text.starts_N, reading.text.ends_N, strict=True) for p in range(a, b)}
    return sorted(set(range(len(reading.text.symbols_B))) - told)


@given(text=TEXTS)
@example(text="".join(CORPUS[:5]))
@settings(max_examples=40, deadline=None)
def test_byte_level_tokens_are_those_of_the_tokenizer_and_stand_for_their_bytes(text: str) -> None:
    reading = READERS["byte level"].read([text.encode()])
    assert reading.ids.tolist() == ids_of(TEACHER, text)
    assert stands_for(reading, [text.encode()]) == [TABLES["byte level"][id_] for id_ in reading.ids]


@pytest.mark.parametrize("name", READERS)
@given(data=st.one_of(TEXTS.map(str.encode), st.binary(max_size=12)))
@example(data="e\u0301 größer 日本 🙂 \u0000 \ufb01".encode())
@settings(max_examples=60, deadline=None)
def test_every_token_stands_for_its_own_bytes_or_a_part_of_them_without_a_space_or_for_none(
    name: str, data: bytes
) -> None:
    reading = READERS[name].read([data])
    pieces = TABLES[name]
    for id_, written in zip(reading.ids, stands_for(reading, [data]), strict=True):
        assert written == b"" or pieces[id_] in (written, b" " + written)


def test_spaces_that_only_a_token_after_them_tells_of_are_no_gap() -> None:
    split = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(UNIGRAM.backend_tokenizer.to_str()))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    for data, out in ((b"the answer then", []), (b"the\tanswer  is 12 ", [3, 10, 11, 17])):
        assert left_out(TextReader(split).read([data])) == out


def test_offsets_without_spaces_do_no_harm() -> None:
    trimming = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(TEACHER.backend_tokenizer.to_str()))
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert left_out(TextReader(trimming).read([b"12  the \xff  the"])) == [8]


@pytest.mark.parametrize("text", ["the answer", " the answer", "  the\n", "größer 日本", "a"])
@pytest.mark.parametrize("name", READERS)
def test_a_known_text_is_read_whole_also_where_the_tokenizer_puts_a_space_before_it(name: str, text: str) -> None:
    if name == "unigram":
        text = text.replace("\n", "")
    assert left_out(READERS[name].read([text.encode()])) == []


def test_the_space_before_a_text_stands_for_nothing() -> None:
    for name, tokenizer in (("unigram", UNIGRAM), ("byte fallback", LLAMA)):
        reading = READERS[name].read([b"the"])
        assert reading.ids.tolist() == ids_of(tokenizer, "the")
        joined = b"".join(TABLES[name][id_] for id_ in reading.ids)
        assert (joined, b"".join(stands_for(reading, [b"the"]))) == (b" the", b"the")


def test_what_is_no_text_is_left_out_and_nothing_else() -> None:
    data = b"the \xf0\x9f answer\xff"
    for name in ("byte level", "normalising", "byte fallback"):
        reading = READERS[name].read([data])
        assert left_out(reading) == [4, 5, 13]
        assert b"".join(stands_for(reading, [data])) == b"the  answer"
    assert reading.ids.tolist() == ids_of(LLAMA, "the \ufffd answer\ufffd")


def test_a_cut_character_at_the_end_leaves_the_text_before_it_whole() -> None:
    for end in range(1, 4):
        reading = READERS["byte level"].read([b"the", "🙂".encode()[:end]])
        assert left_out(reading) == list(range(3, 3 + end))


def test_a_character_that_is_really_there_is_no_fault() -> None:
    assert left_out(READERS["byte level"].read(["\ufffd".encode()])) == []


def test_what_the_tokenizer_normalises_or_does_not_know_is_left_out() -> None:
    text = "12 e\u0301 the"
    reading = READERS["normalising"].read([text.encode()])
    assert reading.ids.tolist() == ids_of(NORMALISING, text)
    assert left_out(reading) == [3, 4, 5]
    assert left_out(READERS["unigram"].read(["the 🙂 then".encode()])) == [4, 5, 6, 7]


def test_units_are_tokens_of_their_own_and_spelled_ones_are_text() -> None:
    end, tool = (TEACHER.convert_tokens_to_ids(token) for token in ("<eos>", "[TOOL]"))
    written: list[Piece] = [b"the", b" th", tool, b"", b"<eos>", end]
    reading = READERS["byte level"].read(written)
    assert stands_for(reading, written)[-1] == b"#"
    assert reading.ids.tolist().count(end) == 1
    assert [i for i, text in zip(reading.ids, stands_for(reading, written), strict=True) if text == b"#"] == [tool, end]
    assert left_out(reading) == []


def test_nothing_is_read_as_nothing() -> None:
    for written in ([], [b""]):
        reading = READERS["byte fallback"].read(written)
        assert (len(reading.ids), len(reading.text.symbols_B)) == (0, 0)


def test_a_text_that_the_tokenizer_refuses_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot encode the text 'the 7' \(.*Missing \[UNK\]"):
        TextReader(build_tokenizer()).read([b"the", b" 7"])


def test_a_limit_that_the_tokenizer_came_with_cuts_nothing() -> None:
    limited = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(TEACHER.backend_tokenizer.to_str()))
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=100)
    assert TextReader(limited).read([CORPUS[0].encode()]).ids.tolist() == ids_of(TEACHER, CORPUS[0])
