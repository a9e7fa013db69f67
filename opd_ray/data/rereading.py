"""A text as another tokenizer reads it: its tokens, and which bytes of the text each of them stands for."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opd_ray.data.alignment import Piece, TokenText
from opd_ray.data.token_text import token_bytes
from opd_ray.protocol import Int32

Place = tuple[int, int]
"""First byte and byte after the last of what a token stands for."""

# Of text decoded with "surrogateescape": bytes that are no UTF-8, or one character.
_NO_TEXT = re.compile("[\udc80-\udcff]+")
_CHARACTER = re.compile(f"{_NO_TEXT.pattern}|.", re.DOTALL)

_LONGEST_QUOTE = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The reader's tokens for a text."""

    ids: Int32  # [M]
    text: TokenText  # the text that was given, and the part of it that each of the M tokens stands for

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.text.ends_N):
            raise ValueError(f"Reading: {len(self.ids)} ids for {len(self.text.ends_N)} tokens, expected equal counts")


class TextReader:
    """Reads text with a tokenizer that did not write it.

    Between units text is encoded as the tokenizer does by itself, without special tokens: none is added at the ends,
    and text that only spells one is no special token. Where the tokenizer reads something else than what is written,
    its tokens stand for nothing and the bytes are left out, up to the nearest characters on both sides that it reads
    right: bytes that are no UTF-8 (a run of them is read as U+FFFD), characters that it normalises or does not know. A
    space that it puts before a text stands for nothing.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._pieces = token_bytes(tokenizer)
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.post_processor = None  # it may take spaces out of a token's offsets
        self._backend.encode_special_tokens = True

    def read(self, pieces: Sequence[Piece]) -> Reading:
        """Return the tokens for a text that is given in the writer's pieces; a unit's number is its token id here.

        Raises ValueError when the tokenizer refuses the text.
        """
        ids: list[int] = []
        places: list[Place] = []
        first = 0
        for part in _parts(pieces):
            if isinstance(part, int):
                of_part, ends = [part], [(0, 1)]
            else:
                of_part, ends = self._encode(part)
            ids += of_part
            places += [(first + start, first + end) for start, end in ends]
            first += 1 if isinstance(part, int) else len(part)
        edges = np.array(places, dtype=np.int64).reshape(-1, 2)
        text = TokenText(
            symbols_B=TokenText.of(pieces).symbols_B,
            starts_N=np.ascontiguousarray(edges[:, 0]),
            ends_N=np.ascontiguousarray(edges[:, 1]),
        )
        return Reading(ids=np.array(ids, dtype=np.int32), text=text)

    def _encode(self, data: bytes) -> tuple[list[int], list[Place]]:
        text = data.decode(errors="surrogateescape")
        shown = _NO_TEXT.sub("\ufffd", text)
        try:
            encoding = self._backend.encode(shown, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            quoted = repr(shown if len(shown) <= _LONGEST_QUOTE else shown[:_LONGEST_QUOTE] + "...")
            raise ValueError(f"the teacher's tokenizer cannot encode the text {quoted} ({error})") from None
        pieces = [self._pieces[id_] for id_ in encoding.ids]
        if b"".join(pieces) == data:
            return encoding.ids, list(_places(pieces, first=0))
        return encoding.ids, _resynchronised(pieces, text=text, offsets=encoding.offsets)


def _parts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield units, and between them the joined bytes where there are any."""
    for is_unit, run in itertools.groupby(pieces, key=lambda piece: isinstance(piece, int)):
        if is_unit:
            yield from run
        elif data := b"".join(piece for piece in run if isinstance(piece, bytes)):
            yield data


def _places(pieces: Iterable[bytes], *, first: int) -> Iterator[Place]:
    for piece in pieces:
        yield first, first + len(piece)
        first += len(piece)


def _resynchronised(pieces: Sequence[bytes], *, text: str, offsets: Sequence[tuple[int, int]]) -> list[Place]:
    """Return the places of tokens that do not all stand for what is written.

    offsets are the characters that each token comes from, the same ones for several tokens where a character was
    split. Tokens are compared with the text in groups, the smallest that share no character with each other.
    """
    characters = [character.encode(errors="surrogateescape") for character in _CHARACTER.findall(text)]
    places: list[Place] = []
    first = stop = end = 0  # of the groups so far: bytes and characters; of this one: characters
    for after, (_, end_of_token) in enumerate(offsets, start=1):
        end = max(end, end_of_token)
        if after == len(offsets) or offsets[after][0] >= end:
            start = offsets[len(places)][0]
            gap, written = b"".join(characters[stop:start]), b"".join(characters[start:end])
            places += _places_in_group(pieces[len(places) : after], gap=gap, written=written, first=first)
            first, stop = first + len(gap) + len(written), end
    return places


def _places_in_group(pieces: Sequence[bytes], *, gap: bytes, written: bytes, first: int) -> Iterator[Place]:
    """Find a group's pieces in what it comes from, or in that and the gap that no token comes from before it."""
    for start, data in ((first, gap + written), (first + len(gap), written)):
        for told in (pieces, [pieces[0].removeprefix(b" "), *pieces[1:]]):
            if b"".join(told) == data:
                return _places(told, first=start)
    return _places([b""] * len(pieces), first=first)
