"""The bytes of tokens, put end to end, are the text: for one small real tokenizer of each kind."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.data.token_text import token_bytes

CORPUS = ["So the answer is 12.", "the then this that those", "größer größer größe", "日本 日本語 日"] * 3
SPECIAL = ["<|im_start|>", "<eos>"]
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from([*CORPUS, *SPECIAL, "<think>", "née", "é", "🙂", "\n\n", "  ", "<0x41>"])
    ),
    max_size=5,
).map("".join)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("née", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def byte_fallback(*, prefix: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 with the prefix and as Gemma without it."""
    characters = sorted({character for text in CORPUS[:2] for character in text.replace(" ", "▁")} | {"▁"})
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "th", "▁th", "▁▁"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("t", "h"), ("▁", "th"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5: a Unigram model, here with each byte as a token of last resort."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [("<unk>", -20.0), *((token, -10.0) for token in tokens), ("▁", -3.0), ("▁the", -2.0), ("日本", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return wrap(tokenizer)


BYTE_LEVEL, LLAMA, GEMMA, METASPACE = byte_level(), byte_fallback(prefix=True), byte_fallback(prefix=False), metaspace()


def joined(tokenizer: PreTrainedTokenizerFast, text: str) -> bytes:
    pieces = token_bytes(tokenizer)
    return b"".join(pieces[token_id] for token_id in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, GEMMA], ids=["byte-level", "gemma"])
@given(text=TEXTS)
@example(text="<|im_start|>größer 日本語 🙂<think>née  é\n</think><eos>")
@settings(max_examples=40, deadline=None)
def test_the_pieces_of_a_text_are_its_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert joined(tokenizer, text.replace("▁", " ")) == text.replace("▁", " ").encode()


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
@given(text=TEXTS)
@example(text="größer 日本語 🙂\n the then")
@settings(max_examples=40, deadline=None)
def test_the_pieces_are_the_bytes_but_for_the_space_that_the_tokenizer_puts_before_a_text(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    # After an added token a text may begin, with another space, again; and Unigram reads a literal `<0x41>` as a byte.
    text = text.replace("<", "").replace("née", "").replace("▁", " ")
    assert joined(tokenizer, text) in (text.encode(), b" " + text.encode())


def test_a_character_may_be_split_over_tokens() -> None:
    for tokenizer in (BYTE_LEVEL, GEMMA):
        pieces = [token_bytes(tokenizer)[token_id] for token_id in tokenizer("🙂")["input_ids"]]
        assert pieces == [b"\xf0", b"\x9f", b"\x99", b"\x82"]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, GEMMA, METASPACE, build_tokenizer()])
def test_there_is_one_piece_for_each_id(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer)
    for token in tokenizer.all_special_tokens:
        assert pieces[tokenizer.convert_tokens_to_ids(token)] == token.encode()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, GEMMA, METASPACE])
def test_added_tokens_are_literal(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = token_bytes(tokenizer)
    for token in ("<|im_start|>", "<think>", "née"):  # as a byte-level name `é` would be the byte 0xE9
        assert pieces[tokenizer.convert_tokens_to_ids(token)] == token.encode()


def test_spaces_that_the_model_makes_are_spaces_also_where_they_are_added_tokens() -> None:
    tokenizer = byte_fallback(prefix=False)
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    assert joined(tokenizer, "t  h") == b"t  h"


def test_one_token_per_character_stands_for_the_character() -> None:
    tokenizer = build_tokenizer()
    assert joined(tokenizer, "7+3=37<eos>") == b"7+3=37<eos>"
    assert token_bytes(tokenizer) == [*(c.encode() for c in "0123456789+="), b"<eos>", b"<pad>"]


def test_an_id_without_a_token_has_no_bytes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3}))
    tokenizer.decoder = decoders.Fuse()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == [b"a", b"", b"", b"b"]


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "no decoder"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]), "Replace"),
    ],
)
def test_an_unknown_kind_is_refused_by_its_name(decoder: decoders.Decoder | None, named: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(ValueError, match=named):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
