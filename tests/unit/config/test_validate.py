import pytest
from config_files import MANDATORY, compose_config, refusal

from opd_ray.config.schema import Config
from opd_ray.config.validate import validate_vocabulary


def refused(*overrides: str) -> str:
    words = refusal(lambda: compose_config(*MANDATORY, *overrides))
    assert "\n" not in words
    return words


def accepted(*overrides: str) -> Config:
    return compose_config(*MANDATORY, *overrides)


def test_an_unknown_built_in_task_is_refused_with_the_known_ones():
    assert refused("data.task=maths") == "data.task=maths: expected a built-in task (copy, sort)"
    assert refused("data.task=null").startswith("data.task=None: expected a built-in task")


def test_an_unknown_one_of_several_built_in_tasks_is_refused_with_the_known_ones():
    assert refused("data.tasks=[sort,maths]") == "data.tasks=maths: expected a built-in task (copy, sort)"
    assert accepted("data.tasks=[sort,copy]", "data.task=null").data.tasks == ["sort", "copy"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_and_built_in_tasks_do_not_go_together(kind: str):
    words = refused(f"data={kind}", "data.path=prompts", "data.tasks=[sort,copy]")
    assert words.startswith(f"data.tasks=['sort', 'copy'] with data={kind}: expected data=task")


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
    assert words.startswith("data.task=maths: unknown verifier 'maths': expected one of sort, copy, exact, numeric")


def test_the_task_of_a_file_may_be_any_whose_entry_names_a_known_verifier():
    given = ("data=jsonl", "data.path=prompts", "data.task=maths")
    assert accepted(*given, "+tasks={maths: {verifier: numeric}}").data.task == "maths"
    words = refused(*given, "+tasks={maths: {verifier: algebra}}")
    assert words.startswith("tasks.maths.verifier=algebra: unknown verifier 'algebra': expected one of sort, copy, exa")


def test_the_rule_of_temperature_and_top_p_holds_for_every_task():
    words = refused("rollout.temperature=0.7", "+tasks={sort: {top_p: 0.9}}")
    assert words.startswith("rollout.temperature=0.7 with tasks.sort.top_p=0.9: ")
    accepted("+tasks={sort: {top_p: 0.9}}")
    accepted("rollout.temperature=0.7", "+tasks={sort: {top_p: 1}}")


def test_a_correction_for_the_nucleus_expects_one_nucleus_for_all_tasks():
    given = ("objective=sampled", "objective.correct_top_p=true", "rollout.top_p=0.9")
    words = refused(*given, "+tasks={sort: {top_p: 0.8}}")
    assert words.startswith("objective.correct_top_p=true with tasks.sort.top_p=0.8: expected rollout.top_p=0.9")
    accepted(*given, "+tasks={sort: {top_p: 0.9}}")


def test_temperature_and_top_p_do_not_go_together():
    words = refused("rollout.temperature=0.7", "rollout.top_p=0.9")
    assert words.startswith("rollout.temperature=0.7 with rollout.top_p=0.9: ")
    assert "set one of them to 1" in words
    assert words.endswith("objective.correct_top_p=true")


@pytest.mark.parametrize("override", ["rollout.temperature=0.7", "rollout.top_p=0.9"])
def test_either_of_temperature_and_top_p_may_differ_from_one(override: str):
    compose_config(*MANDATORY, override)


def test_temperature_and_top_p_go_together_where_the_objective_knows_the_nucleus():
    given = ("rollout.temperature=0.7", "rollout.top_p=0.9", "objective=sampled")
    assert "objective.correct_top_p=true" in refused(*given)
    assert accepted(*given, "objective.correct_top_p=true").rollout.top_p == 0.9


@pytest.mark.parametrize("source", ["teacher", "student", "union"])
def test_a_support_of_one_token_is_refused_where_it_is_renormalised(source: str):
    words = refused("objective=support", f"objective.support={source}", "objective.top_k=1")
    assert words.startswith("objective.top_k=1: expected at least 2")
    accepted("objective=sampled", "objective.top_k=1")
    accepted("objective=full", "objective.top_k=1")
    accepted("objective=support", "objective.top_k=2")


@pytest.mark.parametrize("tail", ["bucket", "sampled_corrected", "sampled_uncorrected", "none"])
def test_a_support_of_one_token_is_enough_where_it_is_not_renormalised(tail: str):
    accepted("objective=support", "objective.top_k=1", f"objective.tail={tail}")


@pytest.mark.parametrize("kind", ["support", "full"])
def test_a_divergence_as_a_reward_is_refused_with_the_reason(kind: str):
    words = refused(f"objective={kind}", "objective.use_as=reward")
    assert words.startswith(f"objective.use_as=reward with objective={kind}: ")
    assert "its policy gradient is zero" in words
    assert words.endswith("expected loss or auto")
    accepted(f"objective={kind}", "objective.use_as=loss")
    accepted(f"objective={kind}", "objective.use_as=auto")


def test_the_log_ratio_of_the_sampled_token_as_a_loss_is_refused_with_the_reason():
    words = refused("objective=sampled", "objective.use_as=loss")
    assert words.startswith("objective.use_as=loss with objective=sampled: ")
    assert "has no teacher in it" in words
    assert "expected reward or auto (a policy gradient), or objective=support or full" in words
    accepted("objective=sampled", "objective.use_as=reward")
    accepted("objective=sampled", "objective.use_as=auto")


@pytest.mark.parametrize("kind", ["support", "full"])
@pytest.mark.parametrize(
    "override",
    ["discount=1", "baseline=kl", "baseline=group_mean", "reward_clip=5", "task_reward_weight=1", "correct_top_p=true"],
)
def test_a_key_of_the_policy_gradient_is_refused_on_the_other_objectives(kind: str, override: str):
    key = override.partition("=")[0]
    words = refused(f"objective={kind}", "rollout.top_p=0.9", f"objective.{override}")
    assert words.startswith(f"objective.{key} with objective={kind}: expected objective=sampled")
    accepted("objective=sampled", "rollout.top_p=0.9", f"objective.{override}")


@pytest.mark.parametrize("override", ["baseline=group_mean", "task_reward_weight=0.5"])
def test_what_compares_the_samples_of_a_prompt_expects_two_of_them(override: str):
    words = refused("objective=sampled", f"objective.{override}", "rollout.samples_per_prompt=1")
    assert words.startswith(f"objective.{override} with rollout.samples_per_prompt=1: expected at least 2")
    accepted("objective=sampled", f"objective.{override}", "rollout.samples_per_prompt=2")


@pytest.mark.parametrize("override", ["baseline=group_mean", "task_reward_weight=0.5"])
def test_what_compares_the_samples_of_a_prompt_expects_two_of_them_of_every_task(override: str):
    given = ("objective=sampled", f"objective.{override}", "rollout.samples_per_prompt=2")
    words = refused(*given, "+tasks={sort: {samples_per_prompt: 1}}")
    assert words.startswith(f"objective.{override} with tasks.sort.samples_per_prompt=1: expected at least 2")
    accepted(*given, "+tasks={sort: {samples_per_prompt: 2}}")


@pytest.mark.parametrize("baseline", ["none", "kl"])
def test_one_sample_is_enough_for_the_other_baselines(baseline: str):
    accepted("objective=sampled", f"objective.baseline={baseline}", "rollout.samples_per_prompt=1")


def test_a_correction_for_the_nucleus_expects_a_nucleus():
    words = refused("objective=sampled", "objective.correct_top_p=true")
    assert words.startswith("objective.correct_top_p=true with rollout.top_p=1: there is no nucleus")


@pytest.mark.parametrize("source", ["student", "union"])
def test_a_support_of_the_student_is_at_most_what_the_engine_is_told_to_give(source: str):
    given = ("objective=support", f"objective.support={source}", "+rollout.engine_args.max_logprobs=31")
    words = refused(*given)
    assert words.startswith("objective.top_k=32: ")
    assert "rollout.engine_args.max_logprobs=31" in words
    accepted(*given, "objective.top_k=31")


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.support=teacher", "+rollout.engine_args.max_logprobs=31"),
        ("objective.support=student", "+rollout.engine_args.max_logprobs=32"),
        ("objective.support=student", "+rollout.engine_args.max_logprobs=-1"),
        ("objective.support=student",),
        ("objective=sampled", "objective.support=student", "+rollout.engine_args.max_logprobs=1"),
    ],
)
def test_a_support_that_the_engine_can_give_or_need_not_give_passes(overrides: tuple[str, ...]):
    accepted("objective=support", *overrides)


@pytest.mark.parametrize("key", ["batch.num_prompts", "eval.num_prompts"])
def test_prompts_that_do_not_divide_over_the_ranks_are_refused(key: str):
    words = refused("learner.num_ranks=4", f"{key}=6")
    assert words.startswith(f"{key}=6: expected a multiple of learner.num_ranks=4")


@pytest.mark.parametrize(("num_prompts", "num_ranks", "num_updates"), [(6, 1, 4), (4, 1, 8), (4, 2, 4)])
def test_updates_that_do_not_get_as_many_prompts_on_every_rank_are_refused(
    num_prompts: int, num_ranks: int, num_updates: int
):
    words = refused(
        f"batch.num_prompts={num_prompts}",
        f"learner.num_ranks={num_ranks}",
        f"learner.updates_per_batch={num_updates}",
        "eval.num_prompts=4",
    )
    assert words.startswith(
        f"batch.num_prompts={num_prompts}: expected a multiple of learner.num_ranks={num_ranks} times"
        f" learner.updates_per_batch={num_updates}"
    )


_ZERO = "learner.engine_args.zero_optimization"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("learner.zero_stage=2", f"+{_ZERO}.stage=3"), f"{_ZERO}.stage=3: expected learner.zero_stage"),
        (
            ("learner.zero_stage=2", f"+{_ZERO}.offload_param.device=cpu"),
            f"{_ZERO}.offload_param with learner.zero_stage=2: expected learner.zero_stage 3",
        ),
        (
            ("learner.zero_stage=0", f"+{_ZERO}.offload_optimizer.device=cpu"),
            f"{_ZERO}.offload_optimizer with learner.zero_stage=0: expected learner.zero_stage 1 or 2 or 3",
        ),
        (
            (f"+{_ZERO}.offload_optimizer=cpu",),
            f"{_ZERO}.offload_optimizer=cpu: expected {_ZERO}.offload_optimizer.device=cpu",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_options_of_zero_that_its_stage_does_not_have_are_refused(given: tuple[str, ...], words: str):
    assert refused(*given).startswith(words)


def test_offloading_passes_through():
    compose_config(*MANDATORY, "learner.zero_stage=1", f"+{_ZERO}.offload_optimizer.device=cpu")
    compose_config(*MANDATORY, "learner.zero_stage=3", f"+{_ZERO}.offload_param.device=cpu")
    compose_config(*MANDATORY, "learner.zero_stage=0", f"+{_ZERO}.offload_param.device=none")


def test_a_sequence_that_could_fit_no_micro_batch_is_refused_with_its_parts():
    given = ("data.max_prompt_tokens=24", "rollout.max_response_tokens=13")
    words = refused(*given, "learner.max_tokens_per_micro_batch=36")
    assert words.startswith("learner.max_tokens_per_micro_batch=36: expected at least 37")
    assert "data.max_prompt_tokens=24 + max_response_tokens=13, the largest of rollout and tasks" in words
    compose_config(*MANDATORY, *given, "learner.max_tokens_per_micro_batch=37")


def test_the_longest_sequence_is_that_of_the_task_with_the_longest_responses():
    given = ("data.max_prompt_tokens=24", "rollout.max_response_tokens=13")
    tasks = "+tasks={sort: {max_response_tokens: 5}, copy: {max_response_tokens: 40}}"
    words = refused(*given, tasks, "learner.max_tokens_per_micro_batch=63")
    assert words.startswith("learner.max_tokens_per_micro_batch=63: expected at least 64")
    assert "max_response_tokens=40, the largest of rollout and tasks" in words
    accepted(*given, tasks, "learner.max_tokens_per_micro_batch=64")


def test_a_batch_larger_than_the_training_set_is_no_fault():
    compose_config(*MANDATORY, "data.num_prompts=2", "batch.num_prompts=32")


def test_a_support_larger_than_the_common_vocabulary_is_refused():
    config = compose_config("experiment=demo", "objective=support", "objective.top_k=32")
    words = refusal(lambda: validate_vocabulary(config, vocab_size=14))
    assert words.startswith("objective.top_k=32: expected at most 14")
    validate_vocabulary(config, vocab_size=32)


@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_the_size_of_the_support_is_read_by_the_support_objective_only(kind: str):
    validate_vocabulary(accepted(f"objective={kind}", "objective.top_k=32"), vocab_size=14)
