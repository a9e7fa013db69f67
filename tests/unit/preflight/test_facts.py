import json
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_ray.data.models import open_model
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.preflight.facts import read_facts


def test_facts_are_those_of_the_files(tmp_path: Path):
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, 39]}))
    facts = read_facts(open_model("student.path", str(tmp_path)))
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert (facts.num_rows, facts.num_tokens) == (40, len(tokenizer))
    assert facts.max_positions == 77
    assert facts.kv_values_per_token == 2 * 3 * 2 * 8
    assert facts.end_tokens == {tokenizer.eos_token, "id 39"}
    assert facts.chat_template is None
