from pathlib import Path

from config_files import MANDATORY, compose_config
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.preflight import model_findings


def found_of_disk(*overrides: str, path: Path) -> str:
    models = (f"student.path={path}", f"teacher.path={path}", f"runs_dir={path}/runs")
    config = compose_config(*MANDATORY, *models, "save_every=1", *overrides)
    (finding,) = (f for f in model_findings(config, vocab_size=32, local=True) if f.name == "disk")
    return finding.found


def test_adapters_are_counted_as_what_is_trained(tmp_path: Path):
    tokenizer = build_tokenizer()
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # 2.1 M parameters or 11,776 of adapters, 16 bytes a checkpoint; the export holds all of them, in float32
    assert "3 checkpoints and the export need about 104.9 MiB" in found_of_disk(path=tmp_path)
    assert "3 checkpoints and the export need about 8.7 MiB" in found_of_disk("student.lora.rank=1", path=tmp_path)
