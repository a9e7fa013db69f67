"""Time and peak memory of one step in this process: resident memory on the CPU, allocated memory on a GPU."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_PEAK_PRODUCT_SIZE = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step costs."""

    time_ms: float  # median of the repeats after the first run
    peak_mb: float  # 10^6 bytes above what was held before the first run, at that run's highest point


def measure(step: Callable[[], object], *, reset: Callable[[], object], repeats: int, device: str) -> Cost:
    """Run a step once for its peak memory, then `repeats` times for its time, with an untimed `reset` before each.

    Everything that is not to be charged to the step must exist, and have been written to, before the call.
    """
    baseline = restart_peak(device)
    step()
    peak_bytes = _peak_bytes(device) - baseline
    times_s = []
    for _ in range(repeats):
        reset()
        times_s.append(_timed(step, device=device))
    return Cost(time_ms=1e3 * statistics.median(times_s), peak_mb=peak_bytes / 1e6)


def peak_flops_per_s() -> float:
    """Return what a plain large bfloat16 product reaches on the GPU."""
    a, b = torch.randn(2, _PEAK_PRODUCT_SIZE, _PEAK_PRODUCT_SIZE, dtype=torch.bfloat16, device="cuda")
    cost = measure(lambda: a @ b, reset=lambda: None, repeats=20, device="cuda")
    return 2 * _PEAK_PRODUCT_SIZE**3 / (cost.time_ms / 1e3)


def _timed(step: Callable[[], object], *, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def restart_peak(device: str) -> int:
    """Set the peak to what is held now, in bytes, and return that."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    _return_free_memory()
    # Where the system does not allow it, the peak is the whole process's: the same, as long as the set-up stays lower.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def _return_free_memory() -> None:
    """Give freed memory back to the system: the step would otherwise use it without being seen to."""
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _peak_bytes(device: str) -> int:
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """Return a size that the system keeps of this process, such as RssAnon: memory of its own."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024
