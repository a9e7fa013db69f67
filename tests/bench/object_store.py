"""Part `object_store`: what groups and scores cost on their way through Ray, from one actor to another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import ray
from harness import Figure, at_least, at_most
from measure import restart_peak, status_bytes

from opd_ray.config.services import ClusterConfig
from opd_ray.protocol import HiddenScore, SampledScore, Score, TrajectoryGroup
from workers.placement import connect
from workers.support_codec import pack_support

_PART = "object_store"
_NUM_SAMPLES, _RESPONSE_TOKENS, _PROMPT_TOKENS = 8, 512, 128
_NUM_TOKENS = _NUM_SAMPLES * _RESPONSE_TOKENS
_TOP_K, _VOCAB_SIZE, _HIDDEN_SIZE = 64, 151_936, 2560  # Qwen3-4B's
_SENT_BYTES, _MAX_SENT = 100_000_000, 256  # sent at once to see them among other memory
_MAX_BYTES, _MAX_WRITTEN, _MAX_READ = 1.1, 1.05, 0.05  # of a message's own size

Message = TrajectoryGroup | Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader finds."""

    num_views: int  # arrays with elements that are read-only views of what Ray holds
    num_arrays: int  # with elements
    copied_bytes: int  # by which the reader's own memory has grown after touching every byte


class Sender:
    """Makes messages as rollout and teacher workers do and returns them beside a summary."""

    def make(self, kind: str, num_messages: int) -> None:
        """Hold messages that share nothing."""
        self._messages = [MESSAGES[kind]() for _ in range(num_messages)]

    def send(self) -> tuple[int, ...]:
        """Return a summary and the messages."""
        self._before = restart_peak("cpu")
        return len(self._messages), *self._messages

    def written_bytes(self) -> int:
        """Return by how much memory, the shared one included, grew at most since the messages were returned."""
        return status_bytes("VmHWM") - self._before


class Reader:
    """Takes messages as the learner does."""

    def rest(self) -> None:
        """Note the memory that is held before any message comes."""
        restart_peak("cpu")
        self._before = status_bytes("RssAnon")

    def read(self, *messages: Message) -> Reading:
        """Touch every byte."""
        arrays = [array for message in messages for array in arrays_of(message) if array.size]
        for array in arrays:
            array.reshape(-1).view(np.uint8).max()
        return Reading(
            num_views=sum(not array.flags.owndata and not array.flags.writeable for array in arrays),
            num_arrays=len(arrays),
            copied_bytes=status_bytes("RssAnon") - self._before,
        )


def object_store() -> Iterator[Figure]:
    """Yield the figures of the part; less than a minute. A group is 8 responses of 512 tokens.

    <kind>_size is the message in Ray's hands over its arrays' own bytes. <kind>_written and <kind>_copied are the
    memory that the sender touches to send and that the reader needs for itself, both over the same: 1 and 0 when a
    message is copied once, into the store, and read where it lies there. Ray keeps an object below 100 kB in its
    owner's memory, the controller's, and sends it from there: <kind>_in_store is 0.
    """
    connect(ClusterConfig(num_cpus=2))
    try:
        sender, reader = ray.remote(Sender).remote(), ray.remote(Reader).remote()
        for kind in MESSAGES:
            yield from _figures(kind, sender, reader)
    finally:
        ray.shutdown()


def _figures(kind: str, sender, reader) -> Iterator[Figure]:
    own_bytes = sum(array.nbytes for array in arrays_of(MESSAGES[kind]()))
    num_messages = min(-(-_SENT_BYTES // own_bytes), _MAX_SENT)
    ray.get(sender.make.remote(kind, num_messages))
    ray.get(reader.rest.remote())
    _, *sent = sender.send.options(num_returns=1 + num_messages).remote()
    ray.wait(sent, num_returns=num_messages, fetch_local=False)
    written_bytes = ray.get(sender.written_bytes.remote())
    reading: Reading = ray.get(reader.read.remote(*sent))
    place = ray.experimental.get_object_locations(sent[:1])[sent[0]]
    in_store = bool(place["node_ids"])
    yield Figure(part=_PART, name=f"{kind}_bytes", value=own_bytes / _NUM_TOKENS, unit="bytes/token")
    size = place["object_size"] / own_bytes
    yield at_most(_MAX_BYTES, part=_PART, name=f"{kind}_size", value=size, unit="of its arrays")
    views = reading.num_views / reading.num_arrays
    yield at_least(1, part=_PART, name=f"{kind}_views", value=views, unit="of its arrays")
    yield Figure(part=_PART, name=f"{kind}_in_store", value=in_store, unit="0 or 1")
    written, copied = (n / own_bytes / num_messages for n in (written_bytes, reading.copied_bytes))
    if in_store:
        yield at_most(_MAX_WRITTEN, part=_PART, name=f"{kind}_written", value=written, unit="of its arrays")
        yield at_most(_MAX_READ, part=_PART, name=f"{kind}_copied", value=copied, unit="of its arrays")
    else:
        yield Figure(part=_PART, name=f"{kind}_written", value=written, unit="of its arrays")
        yield Figure(part=_PART, name=f"{kind}_copied", value=copied, unit="of its arrays")


def arrays_of(message: Message) -> list[np.ndarray]:
    """Return a message's arrays."""
    values = [getattr(message, field.name) for field in fields(message)]
    return [value for value in values if isinstance(value, np.ndarray)]


def _group(support_size: int = 0) -> TrajectoryGroup:
    random = np.random.default_rng(0)
    return TrajectoryGroup(
        prompt_ids=_ids(random, _PROMPT_TOKENS),
        response_ids=_ids(random, _NUM_TOKENS),
        offsets=np.arange(0, _NUM_TOKENS + 1, _RESPONSE_TOKENS, dtype=np.int32),
        sampled_logprobs=-random.random(_NUM_TOKENS, dtype=np.float32),
        token_versions=np.ones(_NUM_TOKENS, dtype=np.int32),
        loss_mask=np.ones(_NUM_TOKENS, dtype=np.bool_),
        support_ids=_ids(random, (_NUM_TOKENS, support_size)),
        rewards=np.ones(_NUM_SAMPLES, dtype=np.float32),
        finish=np.zeros(_NUM_SAMPLES, dtype=np.int8),
        prompt_index=0,
        task=_PART,
        seed=0,
    )


def _sampled_score() -> SampledScore:
    return SampledScore(logprobs_N=-np.random.default_rng(0).random(_NUM_TOKENS, dtype=np.float32))


def _support_score() -> Score:
    random = np.random.default_rng(0)
    ids_NK = np.argsort(random.random((_NUM_TOKENS, _TOP_K)), axis=1).astype(np.int32)
    ids_NK += _TOP_K * random.integers(0, _VOCAB_SIZE // _TOP_K, (_NUM_TOKENS, _TOP_K), dtype=np.int32)
    logprobs_NK = -random.random(ids_NK.shape, dtype=np.float32)
    return pack_support(ids_NK, logprobs_NK, sampled_logprobs_N=np.zeros(_NUM_TOKENS, dtype=np.float32))


def _hidden_score() -> HiddenScore:
    return HiddenScore(
        hidden_ND=np.ones((_NUM_TOKENS, _HIDDEN_SIZE), dtype=np.uint16),
        sampled_logprobs_N=np.zeros(_NUM_TOKENS, dtype=np.float32),
    )


def _ids(random: np.random.Generator, shape: int | tuple[int, int]) -> np.ndarray:
    return random.integers(0, _VOCAB_SIZE, shape, dtype=np.int32)


MESSAGES: dict[str, Callable[[], Message]] = {
    "group": _group,
    "group_with_support": lambda: _group(_TOP_K),
    "sampled": _sampled_score,
    "support": _support_score,
    "hidden": _hidden_score,
}
