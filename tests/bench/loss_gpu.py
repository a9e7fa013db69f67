"""Part `loss_gpu`: the table of part `loss` on a GPU in bfloat16, beside the time of the products alone."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Figure, run_cell
from loss_problem import Sizes, make_problem
from loss_variants import VARIANTS
from measure import peak_flops_per_s

_PART = "loss_gpu"
_NUM_TOKENS = 8192, 32_768
_HIDDEN_SIZE, _VOCAB_SIZE = 2560, 151_936
# Products of N x D x V that an exact loss needs: its logits and two gradients, the teacher's logits; None: needs none.
_NUM_PRODUCTS = {"full": 4, "support": None, "support_tail": 3, "sampled": 3}
_NAIVE_BUFFERS = 7  # float32 [N,V] tensors that the largest full-logits version holds at once, and some room


def loss_gpu() -> Iterator[Figure]:
    """Yield the figures of the part, none without a CUDA device."""
    if not torch.cuda.is_available():
        print(f"{_PART}: skipped, no CUDA device", file=sys.stderr)
        return
    flops_per_s = peak_flops_per_s()
    yield Figure(part=_PART, name="matmul", value=flops_per_s / 1e12, unit="TFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "problem.pt"
        make_problem(_sizes()).save(path)
        torch.cuda.empty_cache()
        for num_tokens in _NUM_TOKENS:
            for objective in VARIANTS:
                yield from _objective(objective, num_tokens=num_tokens, path=path, flops_per_s=flops_per_s)


def _sizes() -> Sizes:
    return Sizes(
        num_tokens=max(_NUM_TOKENS),
        vocab_size=_VOCAB_SIZE,
        student_size=_HIDDEN_SIZE,
        teacher_size=_HIDDEN_SIZE,
        dtype=torch.bfloat16,
        device="cuda",
    )


def _objective(objective: str, *, num_tokens: int, path: Path, flops_per_s: float) -> Iterator[Figure]:
    num_products = _NUM_PRODUCTS[objective]
    for variant in VARIANTS[objective]:
        name = f"{objective}_{variant}_n{num_tokens}"
        if variant == "naive" and _naive_bytes(num_tokens) > torch.cuda.mem_get_info()[0]:
            print(f"{_PART}/{name}: skipped, its logits do not fit this GPU", file=sys.stderr)
            continue
        arguments = ["--problem", str(path), "--num-tokens", str(num_tokens), "--device", "cuda"]
        cost = run_cell("loss_cell.py", objective, variant, *arguments, extra_packages=variant == "liger")
        yield Figure(part=_PART, name=f"{name}_time", value=cost.time_ms, unit="ms")
        yield Figure(part=_PART, name=f"{name}_peak", value=cost.peak_mb, unit="MB")
        if num_products:
            bound_ms = 1e3 * num_products * 2 * num_tokens * _HIDDEN_SIZE * _VOCAB_SIZE / flops_per_s
            yield Figure(part=_PART, name=f"{name}_time_vs_matmul_bound", value=cost.time_ms / bound_ms, unit="ratio")


def _naive_bytes(num_tokens: int) -> int:
    return _NAIVE_BUFFERS * num_tokens * _VOCAB_SIZE * torch.float32.itemsize
