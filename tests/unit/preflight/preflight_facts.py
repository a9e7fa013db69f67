"""Facts of a model that agrees with itself, to be broken in one place."""

from opd_ray.preflight.facts import ModelFacts

STUDENT = ModelFacts(
    key="student.path",
    special_tokens={"eos_token": "<end>", "pad_token": "<pad>"},
    end_tokens=frozenset({"<end>"}),
    chat_template="{{ messages }}",
    num_tokens=100,
    num_rows=128,
    max_positions=2048,
    num_parameters=1_000_000,
    kv_values_per_token=2 * 4 * 2 * 32,
)
