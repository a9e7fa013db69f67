"""The cell that builds what the end-to-end benchmark runs on: a student, a teacher, prompts to train on and held out.

`small` is the demo's own task and models; `larger` has 20 million parameters, random, and responses of varied lengths.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from models import random_20m
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from opd_ray.config.load import load, register_schema
from opd_ray.data.tasks import TASKS
from opd_ray.data.tiny_models import build_tiny_model

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_VOCAB_SIZE, _NUM_END_IDS = 8192, 96  # an end in 85 tokens: lengths are geometric, cut at the limit
_PROMPT_TOKENS = 16, 33  # from, below
_TEACHER_SCALE = 2.0  # of the random weights of the layers: a teacher that has opinions
_NUM_HELD_OUT = {"small": 256, "larger": 64}


def main(size: str, num_prompts: int, folder: Path) -> None:
    """Write `student`, `teacher`, `train.jsonl` and `held_out.jsonl`."""
    held_out = _NUM_HELD_OUT[size]
    prompts = (_small if size == "small" else _larger)(folder, num_prompts=num_prompts + held_out)
    for name, part in (("held_out", prompts[:held_out]), ("train", prompts[held_out:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part))
    print(json.dumps({}))


def _small(folder: Path, *, num_prompts: int) -> list[str]:
    register_schema()
    with initialize_config_dir(config_dir=str(_CONFIGS), version_base=None):
        config = load(compose(config_name="train", overrides=["experiment=demo"]))
    for name, of_role in (("student", config.student), ("teacher", config.teacher)):
        assert of_role.build is not None
        build_tiny_model(folder / name, spec=of_role.build, on_step=lambda *_: None)
    return [example.prompt for example in TASKS["sort"].examples(num_examples=num_prompts, seed=1)]


def _larger(folder: Path, *, num_prompts: int) -> list[str]:
    words = [f"<{i}>" for i in range(_VOCAB_SIZE)]  # no name is a part of another
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0], pad_token=words[_NUM_END_IDS])
    for name, scale in (("student", 1.0), ("teacher", _TEACHER_SCALE)):
        model = random_20m(vocab_size=_VOCAB_SIZE)
        matrices = [parameter.data for parameter in model.model.layers.parameters() if parameter.ndim > 1]
        torch._foreach_mul_(matrices, scale)
        model.generation_config = GenerationConfig(
            eos_token_id=list(range(_NUM_END_IDS)), pad_token_id=fast.pad_token_id
        )
        model.config.eos_token_id, model.config.pad_token_id = fast.eos_token_id, fast.pad_token_id
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    random = np.random.default_rng(1)
    ids = range(_NUM_END_IDS + 1, _VOCAB_SIZE)
    return [
        " ".join(words[i] for i in random.choice(ids, size=random.integers(*_PROMPT_TOKENS)))
        for _ in range(num_prompts)
    ]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
