import pytest
from config_files import MANDATORY, compose_config, refusal

from opd_ray.config.validate import validate_vocabulary


def refused(*overrides: str) -> str:
    words = refusal(lambda: compose_config(*MANDATORY, *overrides))
    assert "\n" not in words
    return words


def test_an_unknown_built_in_task_is_refused_with_the_known_ones():
    assert refused("data.task=maths") == "data.task=maths: expected a built-in task (sort)"
    assert refused("data.task=null").startswith("data.task=None: expected a built-in task")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_from_a_file_expects_its_path(kind: str):
    words = refused(f"data={kind}", "data.task=null")
    assert words == f"data.path is not given: data={kind} expects the path of a file"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_from_a_file_may_name_a_verifier_but_no_unknown_one(kind: str):
    given = (f"data={kind}", "data.path=prompts")
    assert compose_config(*MANDATORY, *given, "data.task=numeric").data.task == "numeric"
    assert compose_config(*MANDATORY, *given, "data.task=null").data.task is None
    words = refused(*given, "data.task=maths")
    assert words.startswith("data.task=maths: unknown verifier 'maths': expected one of sort, exact, numeric")


def test_temperature_and_top_p_do_not_go_together():
    words = refused("rollout.temperature=0.7", "rollout.top_p=0.9")
    assert words.startswith("rollout.temperature=0.7 with rollout.top_p=0.9: ")
    assert words.endswith("set one of them to 1")


@pytest.mark.parametrize("override", ["rollout.temperature=0.7", "rollout.top_p=0.9"])
def test_either_of_temperature_and_top_p_may_differ_from_one(override: str):
    compose_config(*MANDATORY, override)


def test_a_support_of_one_token_is_refused_where_it_is_renormalised():
    words = refused("objective=support", "objective.top_k=1")
    assert words.startswith("objective.top_k=1: expected at least 2")
    compose_config(*MANDATORY, "objective=sampled", "objective.top_k=1")


@pytest.mark.parametrize("key", ["batch.num_prompts", "eval.num_prompts"])
def test_prompts_that_do_not_divide_over_the_ranks_are_refused(key: str):
    words = refused("learner.num_ranks=4", f"{key}=6")
    assert words.startswith(f"{key}=6: expected a multiple of learner.num_ranks=4")


def test_a_sequence_that_could_fit_no_micro_batch_is_refused_with_its_parts():
    given = ("data.max_prompt_tokens=24", "rollout.max_response_tokens=13")
    words = refused(*given, "learner.max_tokens_per_micro_batch=36")
    assert words.startswith("learner.max_tokens_per_micro_batch=36: expected at least 37")
    assert "data.max_prompt_tokens=24 + rollout.max_response_tokens=13" in words
    compose_config(*MANDATORY, *given, "learner.max_tokens_per_micro_batch=37")


@pytest.mark.parametrize("share", ["0.5", "2"])
def test_a_rank_has_one_gpu_or_none(share: str):
    words = refused(f"learner.gpus_per_rank={share}")
    assert words.startswith(f"learner.gpus_per_rank={float(share)}: expected 0 or 1")
    assert "learner.num_ranks" in words


def test_a_batch_larger_than_the_training_set_is_no_fault():
    compose_config(*MANDATORY, "data.num_prompts=2", "batch.num_prompts=32")


def test_a_support_larger_than_the_common_vocabulary_is_refused():
    config = compose_config("experiment=demo", "objective=support", "objective.top_k=32")
    words = refusal(lambda: validate_vocabulary(config, vocab_size=14))
    assert words.startswith("objective.top_k=32: expected at most 14")
    validate_vocabulary(config, vocab_size=32)
