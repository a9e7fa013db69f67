"""Small models that a machine without downloads trains for itself, by supervision on a task.

Shapes: B batch, T tokens of the longest sequence in it.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_ray.config.schema import TinyModelConfig
from opd_ray.data.tasks import TASKS, TaskExample

HEAD_DIM = 32  # the smallest that vLLM's CPU attention has kernels for
MAX_TOKENS = 128
WARMUP_FRACTION = 0.1
PREFIX_NOISE = 0.1  # share of answer tokens that are read as a random digit, while the label stays right
NUM_DIGITS = 10
IGNORED_LABEL = -100  # positions with this label stay out of the cross-entropy
SPEC_FILE = "tiny_model.json"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    SPEC_FILE,
)

OnStep = Callable[[int, int, float], None]
"""(steps done, steps in all, loss in nats per answer token)"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character: digits (the id of a digit is the digit), `+` and `=`.

    `<eos>` and `<pad>` are added by no text; any other character raises.
    """
    tokens = [*"0123456789+=", "<eos>", "<pad>"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def is_built(path: Path, spec: TinyModelConfig) -> bool:
    """Tell whether the folder is complete and was built from exactly this spec."""
    if not all((path / name).is_file() for name in MODEL_FILES):
        return False
    return bool(json.loads((path / SPEC_FILE).read_text()) == asdict(spec))


def build_tiny_model(path: Path, *, spec: TinyModelConfig, on_step: OnStep) -> None:
    """Train a Qwen3 model on the spec's task and write it to `path` as a Hugging Face folder.

    It reads some answer tokens wrong and must still go on right: a teacher scores prefixes that a weaker model wrote.
    The folder appears whole or not at all. A tiny model of another spec is replaced; any other folder there raises
    ValueError, since it was not made here.
    """
    for task in spec.tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}; change *.build.tasks")
    if path.exists() and not (path / SPEC_FILE).is_file():
        raise ValueError(f"{path} exists and holds no {SPEC_FILE}: expected a free path or a tiny model; change *.path")
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = Qwen3ForCausalLM(_model_config(spec, tokenizer))
        _train(model, tokenizer=tokenizer, spec=spec, on_step=on_step)
    _write(path, model=model, tokenizer=tokenizer, spec=spec)


def _model_config(spec: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=2 * spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=spec.tied_embeddings,
        initializer_range=1 / math.sqrt(spec.hidden_size),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _train(
    model: Qwen3ForCausalLM, *, tokenizer: PreTrainedTokenizerFast, spec: TinyModelConfig, on_step: OnStep
) -> None:
    examples = _examples(spec, num_examples=spec.num_steps * spec.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, num_steps=spec.num_steps))
    model.train()
    for step in range(spec.num_steps):
        batch = examples[step * spec.batch_size : (step + 1) * spec.batch_size]
        input_ids_BT, labels_BT = _encode(batch, tokenizer=tokenizer)
        noisy_ids_BT = _with_noise(input_ids_BT, labels_BT=labels_BT)
        loss = model(input_ids=noisy_ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, spec.num_steps, float(loss.detach()))
    model.eval()


def _examples(spec: TinyModelConfig, *, num_examples: int) -> list[TaskExample]:
    """Return examples of the tasks in turn."""
    of_tasks = [TASKS[task].examples(num_examples=num_examples, seed=spec.seed) for task in spec.tasks]
    return [of_tasks[i % len(of_tasks)][i // len(of_tasks)] for i in range(num_examples)]


def _lr_factor(step: int, *, num_steps: int) -> float:
    """Rise linearly over the warm-up, then fall along half a cosine to a tenth."""
    num_warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _encode(examples: list[TaskExample], *, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, both [B, T] int64, padded on the right; only answer and eos carry a label.

    Needs no attention mask: causal attention never looks at padding on the right.
    """
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = [[*ids, eos_id] for ids in tokenizer([example.answer for example in examples])["input_ids"]]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids_BT = torch.full((len(examples), length), pad_id)
    labels_BT = torch.full((len(examples), length), IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids_BT, labels_BT


def _with_noise(input_ids_BT: torch.Tensor, *, labels_BT: torch.Tensor) -> torch.Tensor:
    """Replace a share PREFIX_NOISE of the tokens that carry a label by random digits."""
    is_noise_BT = (torch.rand(input_ids_BT.shape) < PREFIX_NOISE) & (labels_BT != IGNORED_LABEL)
    return torch.where(is_noise_BT, torch.randint(NUM_DIGITS, input_ids_BT.shape), input_ids_BT)


def _write(path: Path, *, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, spec: TinyModelConfig) -> None:
    """Write a folder next to `path`, then rename it: a reader never sees half a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / SPEC_FILE).write_text(json.dumps(asdict(spec), indent=2) + "\n")
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
