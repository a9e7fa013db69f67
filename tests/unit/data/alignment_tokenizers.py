"""Real tokenizers of several kinds, trained on one text, for the tests of alignment."""

import json

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "So the answer is 12, and the other answer is 144.",
    "the then this that those there though through thinking",
    "größer größer größe, wie groß ist das größte Maß?",
    "日本語 日本 日本語の文章 日",
    "def answer(question):\n    return thinking(question)\n",
] * 4

TEXTS = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*CORPUS[:5], "the", " then", "é", "e\u0301", "🙂", "\n\n", "  "])),
    max_size=5,
).map("".join)


def wrap(tokenizer: Tokenizer, *, special: list[str], added: list[str]) -> PreTrainedTokenizerFast:
    """Add tokens; the first special one is the end token."""
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], clean_up_tokenization_spaces=False)


def byte_level(vocab_size: int, *, words: bool, special: list[str], added: list[str]) -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen with words; without, tokens may reach over the end of a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, special=special, added=added)


def unigram() -> PreTrainedTokenizerFast:
    """As T5: SentencePiece's Unigram, whose texts begin with a space and which does not know every character."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, special=["</s>"], added=["[TOOL]"])


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: a space goes before every text, and what is no token becomes bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=40,
        max_token_length=8,
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    # Trained bytes are special tokens; the model that is built anew from vocabulary and merges has them as bytes.
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrap(tokenizer, special=["</s>"], added=["[TOOL]"])


STUDENT = byte_level(
    330, words=True, special=["<|im_end|>", "<|im_start|>", "<|pad|>"], added=["<tool_call>", "<think>"]
)
TEACHER = byte_level(400, words=False, special=["<eos>", "<|pad|>"], added=["[TOOL]"])
NORMALISING = byte_level(400, words=True, special=["<eos>", "<|pad|>"], added=["[TOOL]"])
NORMALISING.backend_tokenizer.normalizer = normalizers.NFC()
UNIGRAM, LLAMA = unigram(), byte_fallback()
TEACHERS = {"byte level": TEACHER, "normalising": NORMALISING, "unigram": UNIGRAM, "byte fallback": LLAMA}


def token_map(teacher: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return what maps the student's tokens that have a counterpart of another name."""
    return {"<|im_end|>": teacher.eos_token, "<tool_call>": "[TOOL]"}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode, reading special tokens that the text spells."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
