"""Part `teacher`: scoring on the CPU, ours against vLLM's prompt log-probs: speed, Python time, bytes, agreement."""

import pickle
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from harness import Figure, at_least, at_most, run_script
from teacher_problem import save_teacher

from workers.support_codec import pack_support

_PART = "teacher"
_TOP_K = 64
_WIDE_VOCABULARY = 151_936  # Qwen's
_MIN_SPEED: dict[str, float | None] = {"hidden": 2.5, "support_student": 2.5, "support_teacher": 1.3, "sampled": None}
"""Of the tokens/s of default_k64, what peers ask for."""
_MIN_PYTHON = {"default_k64": 50, "flat_k64": 5}  # theirs as a multiple of ours
_MAX_SUPPORT_BYTES = 6 * _TOP_K + 8  # a token
_MAX_DIFFERENCE = 1e-3  # nats

Way = Mapping[str, float]


def teacher() -> Iterator[Figure]:
    """Yield the figures of the part; about 3 minutes on two cores."""
    with tempfile.TemporaryDirectory() as name:
        save_teacher(Path(name))
        result = run_script("teacher_cell.py", name)
    ways: dict[str, Way] = result["ways"]
    for name, way in ways.items():
        yield Figure(part=_PART, name=f"{name}_speed", value=way["tokens_per_s"], unit="tokens/s")
        yield Figure(part=_PART, name=f"{name}_python", value=way["python_us"], unit="us/token")
        yield _bytes(name, way["bytes"])
    yield _bytes(f"support_v{_WIDE_VOCABULARY}", _wide_support_bytes())
    for name, limit in _MIN_SPEED.items():
        yield at_most(
            _MAX_DIFFERENCE, part=_PART, name=f"{name}_difference", value=result["differences"][name], unit="nats"
        )
        yield _speed(name, ways[name]["tokens_per_s"] / ways["default_k64"]["tokens_per_s"], limit=limit)
        for other, least in _MIN_PYTHON.items():
            ratio = ways[other]["python_us"] / ways[name]["python_us"]
            yield at_least(least, part=_PART, name=f"{name}_python_vs_{other}", value=ratio, unit="ratio")
    yield Figure(part=_PART, name="prefix_sharing_speedup", value=result["prefix_sharing_speedup"], unit="ratio")


def _bytes(name: str, value: float) -> Figure:
    if name.startswith("support"):
        return at_most(_MAX_SUPPORT_BYTES, part=_PART, name=f"{name}_bytes", value=value, unit="bytes/token")
    return Figure(part=_PART, name=f"{name}_bytes", value=value, unit="bytes/token")


def _speed(name: str, ratio: float, *, limit: float | None) -> Figure:
    name = f"{name}_speed_vs_default_k64"
    if limit is None:
        return Figure(part=_PART, name=name, value=ratio, unit="ratio")
    return at_least(limit, part=_PART, name=name, value=ratio, unit="ratio")


def _wide_support_bytes() -> float:
    """Return the size of a support whose ids need more than 16 bits."""
    random = np.random.default_rng(0)
    num_tokens = 1000
    ids_NK = np.stack([random.choice(_WIDE_VOCABULARY, _TOP_K, replace=False) for _ in range(num_tokens)])
    logprobs_NK = -random.exponential(10, ids_NK.shape).astype(np.float32)
    score = pack_support(ids_NK.astype(np.int32), logprobs_NK, sampled_logprobs_N=np.empty(0, dtype=np.float32))
    return len(pickle.dumps(score, protocol=5)) / num_tokens
