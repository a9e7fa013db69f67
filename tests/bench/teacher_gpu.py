"""Part `teacher_gpu`: scoring on a GPU in bfloat16, beside what the products alone would take. Not run so far."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Figure, run_script
from measure import peak_flops_per_s
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

_PART = "teacher_gpu"
NUM_SEQUENCES = 64
_QWEN3_4B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    architectures=["Qwen3ForCausalLM"],
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    dtype="bfloat16",
)


def teacher_gpu() -> Iterator[Figure]:
    """Yield the figures of the part, none without a CUDA device."""
    if not torch.cuda.is_available():
        print(f"{_PART}: skipped, no CUDA device", file=sys.stderr)
        return
    flops_per_s = peak_flops_per_s()
    torch.cuda.empty_cache()
    yield Figure(part=_PART, name="matmul", value=flops_per_s / 1e12, unit="TFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        save_shape(_QWEN3_4B, Path(name))
        tokens_per_s: dict[str, float] = run_script("teacher_gpu_cell.py", name, "1", str(NUM_SEQUENCES))
    for way, value in tokens_per_s.items():
        yield Figure(part=_PART, name=f"{way}_speed", value=value, unit="tokens/s")
        flops = 2 * num_parameters(_QWEN3_4B, with_head=way in ("sampled", "support_teacher"))
        yield Figure(part=_PART, name=f"{way}_share_of_matmul", value=value * flops / flops_per_s, unit="ratio")


def save_shape(config: Qwen3Config, folder: Path) -> None:
    """Write what a worker reads itself: the model's shape and a random head. The engine makes up the other weights."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(config.vocab_size, config.hidden_size, generator=generator).mul_(0.02)
    save_file({"model.embed_tokens.weight": head_VD.to(config.dtype)}, folder / "model.safetensors")


def num_parameters(config: Qwen3Config, *, with_head: bool) -> int:
    """Return how many weights multiply every token; looking up its embedding multiplies nothing."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    body = sum(weight.numel() for weight in model.model.layers.parameters())
    return body + with_head * config.vocab_size * config.hidden_size
