"""Part `sync`: new weights through the object store against a plain copy, and how many of their elements are new."""

import statistics
import time
from collections.abc import Iterator

import numpy as np
import ray
import torch
from harness import Figure, at_most
from models import random_20m, random_model

from opd_ray.config.services import ClusterConfig
from workers.placement import connect
from workers.sync.object_store import ObjectStorePublisher
from workers.sync.source import StudentWeights
from workers.weights import Buffers, WeightManifest, as_bytes, check_publication, read_tensors

_PART = "sync"
_VOCAB_SIZE, _HIDDEN_SIZE = 8192, 1024
_NUM_LAYERS = {"0.1_gb": 3, "0.5_gb": 15}  # of bfloat16 weights, about
_ROUNDS = 7
_STORE_BYTES = 3_000_000_000  # more than all versions that are held at a time
_MAX_RATIO = 3.0
_LEARNING_RATES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
_BATCH = (4, 256)  # sequences, tokens
_MASK_SHARE = 1 / 16  # a bit an element, of its 16


class Publishing:
    """The learner's rank 0, with weights in the type in which they travel."""

    def __init__(self, num_layers: int) -> None:
        self._model = _model(num_layers).to(torch.bfloat16)
        weights = StudentWeights(self._model, dtype=torch.bfloat16, partitioned=False, reads=True)
        self._publisher = ObjectStorePublisher(weights, rank=0)

    def publish(self, version: int) -> tuple[WeightManifest | None, Buffers | None]:
        """Return a version, as the learner does."""
        return self._publisher.publish(version)

    def write_to_store(self) -> None:
        """Touch as many pages of the store as publications will use, and give them back."""
        filler = ray.put(np.ones(_STORE_BYTES, dtype=np.uint8))
        del filler
        time.sleep(1.0)  # the store frees it a little later

    def plain_copy_s(self) -> list[float]:
        """Return how long copies of all tensors take in this process, into memory that has been written to before."""
        sources = [as_bytes(parameter) for parameter in self._model.parameters()]
        targets = [np.zeros_like(source) for source in sources]
        return [_copy_s(sources, targets) for _ in range(_ROUNDS)]


class Receiving:
    """A rollout worker without an engine."""

    def __init__(self, num_layers: int) -> None:
        with torch.device("meta"):
            self._shapes = {name: tuple(p.shape) for name, p in _model(num_layers).named_parameters()}

    def prepare(self, manifest: WeightManifest, buffers: Buffers) -> int:
        """Check a version, map all its tensors and return their size in bytes."""
        check_publication(manifest, buffers, shapes=self._shapes)
        return sum(tensor.nbytes for _, tensor in read_tensors(buffers, manifest))


def sync() -> Iterator[Figure]:
    """Yield the figures of the part; about a minute.

    <size>_publish is from the controller's call until the worker has all tensors, <size>_copy one thread's copy of the
    same bytes; both are medians, into memory that the process has written to before: after some steps the store's is.
    changed_<rate> is the share of bfloat16 elements that the first step of AdamW changes, which moves every weight by
    about the rate; sparse_<rate> is what it would leave of the bytes to send the changed ones alone and a bit for each
    that says whether it is.
    """
    connect(ClusterConfig(num_cpus=2))
    try:
        for size, num_layers in _NUM_LAYERS.items():
            yield from _speed(size, num_layers)
    finally:
        ray.shutdown()
    for rate, share in _changed_shares().items():
        yield Figure(part=_PART, name=f"changed_{rate:g}", value=share, unit="of elements")
        yield Figure(part=_PART, name=f"sparse_{rate:g}", value=share + _MASK_SHARE, unit="of bytes")


def _speed(size: str, num_layers: int) -> Iterator[Figure]:
    learner = ray.remote(Publishing).remote(num_layers)
    worker = ray.remote(Receiving).remote(num_layers)
    ray.get(learner.write_to_store.remote())
    seconds, num_bytes = [], 0
    for version in range(1 + _ROUNDS):
        start = time.perf_counter()
        manifest, buffers = learner.publish.options(num_returns=2).remote(version)
        num_bytes = ray.get(worker.prepare.remote(manifest, buffers))
        seconds.append(time.perf_counter() - start)
        del manifest, buffers
    copies_s = ray.get(learner.plain_copy_s.remote())
    publish, copy = (statistics.median(times) * 1e9 / num_bytes for times in (seconds[1:], copies_s))
    yield Figure(part=_PART, name=f"{size}_bytes", value=num_bytes / 1e9, unit="GB")
    yield Figure(part=_PART, name=f"{size}_copy", value=copy, unit="s/GB")
    yield Figure(part=_PART, name=f"{size}_publish", value=publish, unit="s/GB")
    yield at_most(_MAX_RATIO, part=_PART, name=f"{size}_vs_copy", value=publish / copy, unit="ratio")
    ray.kill(learner)
    ray.kill(worker)


def _changed_shares() -> dict[float, float]:
    """Return, by learning rate, which share of a 20M model's elements has other bits in bfloat16 after one update."""
    model = random_20m(vocab_size=_VOCAB_SIZE)
    ids_BT = torch.randint(_VOCAB_SIZE, _BATCH)
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    shares = {}
    for rate in _LEARNING_RATES:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0).step()
        changed = sum(
            int((parameter.detach().bfloat16() != value.bfloat16()).sum())
            for parameter, value in zip(model.parameters(), start, strict=True)
        )
        shares[rate] = changed / sum(value.numel() for value in start)
    return shares


def _model(num_layers: int):
    return random_model(
        vocab_size=_VOCAB_SIZE,
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=4 * _HIDDEN_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )


def _copy_s(sources: list[np.ndarray], targets: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for source, target in zip(sources, targets, strict=True):
        np.copyto(target, source)
    return time.perf_counter() - start
