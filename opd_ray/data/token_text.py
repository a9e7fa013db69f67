"""The bytes that each token id stands for in a text."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerFast

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Return for every token id the bytes that it contributes to a text; b"" for an id that names no token.

    Concatenated over the ids of a text they are its bytes, as the tokenizer normalised it, also where a character is
    split over tokens. Two exceptions: a space that the tokenizer itself puts before a piece of text (Llama's `▁`) is
    here too, and an unknown-token stands for itself. A special token contributes its literal content.

    The tokenizer's decoder says what a token's name means: byte-level BPE, `▁` for a space (with `<0xNN>` for a byte)
    or the text itself. A decoder that does anything else, such as putting spaces between tokens, raises ValueError.
    """
    backend = tokenizer.backend_tokenizer
    steps = _steps_of_tokens(json.loads(backend.to_str())["decoder"])
    name_of = {token_id: name for name, token_id in backend.get_vocab(with_added_tokens=False).items()}
    bytes_of = {token_id: _bytes(name, steps=steps) for token_id, name in name_of.items()}
    for token_id, added in tokenizer.added_tokens_decoder.items():
        # The model itself may also make an ordinary added token, Gemma's `▁▁` for two spaces: then it is no literal.
        if added.special or name_of.get(token_id) != added.content:
            bytes_of[token_id] = added.content.encode()
    return [bytes_of.get(token_id, b"") for token_id in range(max(bytes_of, default=-1) + 1)]


def _steps_of_tokens(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the decoder's steps that read one token at a time; ValueError if it has others that change the text."""
    if decoder is None:
        raise ValueError("the tokenizer has no decoder: expected one of ByteLevel, Metaspace, ByteFallback, Fuse")
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    num_steps = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    # After Fuse the whole text is one piece; what Strip takes from its ends is the space that the tokenizer put there.
    is_known = all(map(_reads_one_token, steps[:num_steps])) and set(kinds[num_steps:]) <= {"Fuse", "Strip"}
    if not is_known:
        raise ValueError(
            f"unknown kind of tokenizer, its decoder is {json.dumps(decoder, ensure_ascii=False)}: "
            "expected ByteLevel, Metaspace, or Replace, ByteFallback, Fuse, Strip in this order"
        )
    return steps[:num_steps]


def _reads_one_token(step: dict[str, Any]) -> bool:
    kind = step["type"]
    return kind in ("ByteLevel", "ByteFallback", "Metaspace") or (kind == "Replace" and "String" in step["pattern"])


def _bytes(name: str, *, steps: list[dict[str, Any]]) -> bytes:
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                return _byte_level(name)
            case "ByteFallback" if found := _BYTE_TOKEN.fullmatch(name):
                return bytes([int(found[1], 16)])
            case "Metaspace":
                name = name.replace(step["replacement"], " ")
            case "Replace":
                name = name.replace(step["pattern"]["String"], step["content"])
    return name.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character in names of byte-level tokens, as GPT-2 defined it.

    Printable bytes of Latin-1 stand for themselves; the others, in their order, are the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level(name: str) -> bytes:
    """Return the bytes of a byte-level token; a name with another character is no such token but its own text."""
    is_byte_level = all(character in _BYTE_OF for character in name)
    return bytes(_BYTE_OF[character] for character in name) if is_byte_level else name.encode()
