"""Reads what the checks need to know of a model from its folder: tokens, shapes and sizes, never the weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from opd_ray.data.models import ModelFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model's files say of it."""

    key: str  # configuration key of its path
    special_tokens: Mapping[str, str]  # role -> token
    end_tokens: frozenset[str]  # that end a response: of the tokenizer, config.json and generation_config.json
    chat_template: str | None
    num_tokens: int  # of the tokenizer's map, counted to the highest id
    num_rows: int  # of the head; those beyond num_tokens are padding
    max_positions: int | None  # None: config.json names none
    num_parameters: int
    kv_values_per_token: int  # keys and values of one token in all layers


def read_facts(files: ModelFiles) -> ModelFacts:
    """Return the facts of an opened model."""
    config, tokenizer = files.config, files.tokenizer
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    token_of = {index: token for token, index in vocabulary.items()}
    end_ids = {tokenizer.eos_token_id, *_ids(getattr(config, "eos_token_id", None)), *_generation_ids(files.folder)} - {
        None
    }
    return ModelFacts(
        key=files.key,
        special_tokens={role: str(token) for role, token in tokenizer.special_tokens_map.items()},
        end_tokens=frozenset(token_of.get(i, f"id {i}") for i in end_ids),
        chat_template=_template(tokenizer.chat_template),
        num_tokens=max(token_of) + 1,
        num_rows=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        num_parameters=num_parameters(files.folder),
        kv_values_per_token=_kv_values(config),
    )


def num_parameters(folder: Path) -> int:
    """Return the number of values in the folder's safetensors, from their headers."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            count += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    return count


def _template(template: Any) -> str | None:
    """Return the template as text; a tokenizer may have several by name."""
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _generation_ids(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    return _ids(json.loads(file.read_text()).get("eos_token_id")) if file.exists() else []


def _kv_values(config: Any) -> int:
    """Count keys and values as ordinary attention keeps them: an upper bound where layers share or compress them."""
    num_heads = getattr(config, "num_attention_heads", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not num_heads or not num_layers:
        return 0
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int(2 * num_layers * num_kv_heads * head_dim)
