import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.output_head import load_head

HEAD = torch.arange(24, dtype=torch.float32).reshape(6, 4)
EMBEDDING = -HEAD - 1
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"


def save_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> str:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)


def save_whole(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_an_untied_model_has_a_head_of_its_own(tmp_path: Path):
    path = save_whole(tmp_path, {EMBEDDING_NAME: EMBEDDING, HEAD_NAME: HEAD})
    assert torch.equal(load_head(path, vocab_size=6), HEAD)


def test_the_head_of_a_tied_model_is_its_input_embedding(tmp_path: Path):
    path = save_whole(tmp_path, {EMBEDDING_NAME: EMBEDDING})
    assert torch.equal(load_head(path, vocab_size=6), EMBEDDING)


def test_rows_beyond_the_vocabulary_are_cut_and_the_type_is_kept(tmp_path: Path):
    path = save_whole(tmp_path, {HEAD_NAME: HEAD.to(torch.bfloat16)})
    head = load_head(path, vocab_size=5)
    assert head.dtype is torch.bfloat16
    assert torch.equal(head, HEAD[:5].to(torch.bfloat16))


def test_the_head_of_a_sharded_untied_model_is_found_through_its_index(tmp_path: Path):
    shards = {"model-1.safetensors": {EMBEDDING_NAME: EMBEDDING}, "model-2.safetensors": {HEAD_NAME: HEAD}}
    assert torch.equal(load_head(save_sharded(tmp_path, shards), vocab_size=6), HEAD)


def test_the_head_of_a_sharded_tied_model_is_found_through_its_index(tmp_path: Path):
    shards = {"model-1.safetensors": {"other": HEAD}, "model-2.safetensors": {EMBEDDING_NAME: EMBEDDING}}
    assert torch.equal(load_head(save_sharded(tmp_path, shards), vocab_size=6), EMBEDDING)


def test_a_checkpoint_without_head_or_embedding_is_refused_by_name(tmp_path: Path):
    path = save_whole(tmp_path, {"other": HEAD})
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no output head: expected {HEAD_NAME} or "):
        load_head(path, vocab_size=6)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lm_head.qweight": HEAD.int(), EMBEDDING_NAME: EMBEDDING},
        {HEAD_NAME: HEAD.to(torch.int8), "lm_head.weight_scale": HEAD[:, :1].contiguous(), EMBEDDING_NAME: EMBEDDING},
        {HEAD_NAME: HEAD.to(torch.float8_e4m3fn), EMBEDDING_NAME: EMBEDDING},
    ],
    ids=["packed", "int8", "float8"],
)
def test_a_quantised_head_is_refused_and_the_embedding_not_taken_for_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
):
    with pytest.raises(ValueError, match=r"no output head: expected lm_head\.weight or"):
        load_head(save_whole(tmp_path, tensors))
