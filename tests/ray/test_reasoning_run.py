"""A run on datasets of reasoning-gym and an evaluation of its student: chat prompts, the datasets' own rules."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from head_node import PROJECT
from helpers import read_lines, run_train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a random model whose tokens are bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def test_a_run_trains_on_datasets_and_its_student_is_evaluated_on_one(
    overrides: Callable[..., list[str]], byte_model: str, tmp_path: Path
) -> None:
    given = [o for o in overrides() if not o.startswith("data.task=")]
    models_of = [f"student.path={byte_model}", f"teacher.path={byte_model}", "learner.lr=1e-9"]
    data = ["data=reasoning_gym", "data.tasks=[gcd,chain_sum]", "data.max_prompt_tokens=600"]
    summary, _ = run_train([*given, *models_of, *data, "learner.max_tokens_per_micro_batch=2048"])
    assert summary["reverse_kl_after"] < 1e-4  # the teacher is the student
    run_dir = tmp_path / "runs" / "test"
    lines = read_lines(run_dir / "metrics.jsonl")
    assert all({"eval/accuracy_gcd", "eval/accuracy_chain_sum"} <= m.keys() for m in lines if "eval/accuracy" in m)
    assert all(m["rollout/accuracy"] == 0 for m in lines if m["step"] > 0)  # marked: noise is no answer
    (told, *_) = read_lines(run_dir / "traces.jsonl")
    assert told["tasks"]["gcd"]["traces"][0]["prompt"].startswith("<user>Find the Greatest Common Divisor")

    output = tmp_path / "results.json"
    command = ["-m", "opd_ray.evaluate", f"model={run_dir}", "task=reasoning_gym/gcd", "num_prompts=4", "num_samples=2"]
    done = subprocess.run(
        [sys.executable, *command, "max_response_tokens=8", "dtype=float32", f"output={output}"],
        cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(output.read_text())["results"]
    assert (result["task"], result["num_prompts"], result["estimates"]["greedy"]["value"]) == ("gcd", 4, 0.0)
