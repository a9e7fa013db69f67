import shutil
from pathlib import Path

import pytest
import yaml
from config_files import CONFIG_DIR, refusal

from opd_ray.config.cli import RENAMED, check_overrides, known_keys
from opd_ray.config.load import register_schema
from opd_ray.config.services import EvalConfig

DEMO = ("experiment=demo", "tracking=none")


def test_flags_may_stand_between_overrides():
    register_schema()
    arguments = ["seed=1,2", "-m", "experiment=demo"]
    assert check_overrides(arguments, config_dir=CONFIG_DIR) == ["-m", "seed=1,2", "experiment=demo"]


def check(*arguments: str) -> None:
    register_schema()
    check_overrides([*DEMO, *arguments], config_dir=CONFIG_DIR)


def refused(*arguments: str) -> str:
    words = refusal(lambda: check(*arguments))
    assert "\n" not in words, "the message takes one line"
    return words


def test_every_key_of_the_schema_is_known_in_dotted_form():
    keys = known_keys()
    assert {"name", "learner", "learner.lr", "student.build.num_layers", "rollout.engine_args", "tasks.*.share"} <= set(
        keys
    )
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("learner.lr=1e-4", "name=other", "objective=sampled"),
        ("+rollout.engine_args.seed=1",),
        ("cluster=gpus",),
        ("resume=auto",),
        ("student.build=null",),
        ("--config-name=train",),
        ("-m", "seed=1,2"),
        ("--multirun", "seed=range(1,4)", "objective=full,sampled", "learner.lr=choice(1e-3,1e-4)"),
        ("hydra.run.dir=elsewhere",),
    ],
)
def test_overrides_that_compose_pass(arguments: tuple[str, ...]):
    check(*arguments)


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("learner.lrr=1", "learner.lrr", "learner.lr"),
        ("learner.num_rank=1", "learner.num_rank", "learner.num_ranks"),
        ("max_stalness=1", "max_stalness", "max_staleness"),
        ("student.build.layers=2", "student.build.layers", "student.build.num_layers"),
        ("nme=x", "nme", "name"),
        ("rollout.max_respones_tokens=3", "rollout.max_respones_tokens", "rollout.max_response_tokens"),
        ("learner.samples_per_prompt=3", "learner.samples_per_prompt", "eval.samples_per_prompt"),
        ("eval.top_p=0.5", "eval.top_p", "rollout.top_p"),
        ("rollout.share=2", "rollout.share", "tasks.*.share"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_one(override: str, key: str, meant: str):
    assert refused(override) == f"{key}: no such key; did you mean {meant}?"


@pytest.mark.parametrize(
    ("override", "block"),
    [
        ("tasks.sort.share=2", "tasks"),
        ("+tasks.sort.share=2", "tasks"),
        ("++tasks.sort={share: 2}", "tasks"),
        ("teachers.sort.path=a", "teachers"),
        ("+teachers.sort.path=a", "teachers"),
    ],
)
def test_an_entry_of_a_task_that_is_not_there_yet_is_refused_with_the_way_to_add_it(override: str, block: str):
    assert refused(override) == f"{block}.sort: no such entry yet; add it whole: '+{block}={{sort: {{...}}}}'"


def test_an_entry_of_a_task_may_be_added_whole_and_a_wrong_key_in_it_is_named():
    check("+tasks={sort: {share: 2}}", "tasks.sort.loss_weight=2", "+teachers={sort: {path: a}}")
    assert refused("+tasks={sort: {shaer: 2}}").startswith("tasks.sort.shaer: no such key")


def test_a_misspelt_block_is_refused_with_the_nearest_key():
    words = refused("lerner.lr=1")
    assert words.startswith("lerner")
    assert "did you mean learner" in words


def test_a_key_like_no_other_is_refused_without_a_guess():
    assert refused("qqqqqqqqqqqqqqq=1") == "qqqqqqqqqqqqqqq: no such key"


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("learner.lr=abc", "learner.lr", "'abc'"),
        ("learner.num_ranks=1.5", "learner.num_ranks", "'1.5'"),
        ("num_steps=many", "num_steps", "'many'"),
        ("num_steps=null", "num_steps", "num_steps"),
        ("deterministic=maybe", "deterministic", "'maybe'"),
        ("cluster.address=[1]", "cluster.address", "[1]"),
        ("learner.engine_args=3", "learner.engine_args", "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_key_and_value(override: str, key: str, given: str):
    words = refused(override)
    assert words.startswith(f"{key}: ")
    assert given in words


def test_a_value_outside_an_enumeration_is_refused_with_the_choices():
    assert refused("resume=maybe") == "resume: Invalid value 'maybe', expected one of [never, auto, overwrite]"


def test_an_unknown_choice_of_a_group_is_refused_with_the_available_ones():
    assert refused("objective=fulll") == "objective=fulll: no such choice (available: full, sampled, support)"


def test_an_unknown_experiment_is_refused_with_the_available_ones():
    words = refusal(lambda: check_overrides(["experiment=nope"], config_dir=CONFIG_DIR))
    assert words.startswith("experiment=nope: no such choice (available: ")
    assert "demo" in words


def test_a_new_engine_argument_without_its_plus_is_refused_with_the_way_to_add_it():
    words = refused("rollout.engine_args.seed=1")
    assert words.startswith("rollout.engine_args.seed: ")
    assert "+rollout.engine_args.seed" in words


def test_a_key_added_with_a_plus_must_be_one_of_the_schemas():
    assert refused("+foo=1").startswith("foo: no such key")


@pytest.mark.parametrize("override", ["seed=1,2", "seed=range(1,3)", "objective=full,sampled", "data.path=a,b.jsonl"])
def test_several_values_without_multirun_are_refused(override: str):
    words = refused(override)
    assert words.startswith(override.split("=")[0])
    assert "--multirun" in words


@pytest.mark.parametrize("override", ["objective=full,nope", "experiment=demo,nope"])
def test_an_unknown_choice_inside_a_sweep_is_refused_before_the_first_job(override: str):
    assert "nope: no such choice" in refused("--multirun", override)


@pytest.mark.parametrize("override", ["learner.lrr=1,2", "learner.num_ranks=1,x"])
def test_a_wrong_key_or_value_inside_a_sweep_is_refused_before_the_first_job(override: str):
    assert refused("--multirun", override).startswith(override.split("=")[0])


@pytest.mark.parametrize(
    "override", ["learner.lr", "=3", "name=it's", "student.path=~/models", "objective=[a", "data.path=/a/b c=d.jsonl"]
)
def test_an_override_that_cannot_be_read_is_quoted_without_the_parsers_own_words(override: str):
    words = refused(override)
    assert override in words
    assert "Exception" not in words
    assert "viable" not in words


def test_a_value_in_the_place_of_a_group_is_refused_with_what_was_given():
    assert "learner=3" in refused("learner=3")


def test_an_experiment_that_is_no_yaml_is_named_with_its_line(tmp_path: Path):
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    (configs / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\ndata: {path: ???}\n")
    register_schema()
    words = refusal(lambda: check_overrides(["experiment=mine"], config_dir=configs))
    assert "experiment/mine.yaml" in words
    assert "line 3" in words
    assert "\n" not in words


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("rollout.n=8", "rollout.samples_per_prompt"),
        ("learner.learning_rate=1", "learner.lr"),
        ("max_steps=3", "num_steps"),
    ],
)
def test_a_name_that_other_systems_have_for_a_key_is_answered_with_ours(override: str, meant: str):
    key = override.partition("=")[0]
    assert refused(override) == f"{key}: no such key; here it is {meant}"


def test_keys_that_are_told_as_renamed_do_not_exist_and_their_successors_do():
    keys = known_keys()
    assert not [old for old in RENAMED if old in keys]
    assert all(new.partition(",")[0] in keys for new in RENAMED.values() if not new.startswith("nothing"))


def test_both_ends_of_an_interval_are_tried():
    check("--multirun", "learner.lr=interval(1e-5,1e-3)")
    assert "learner.num_ranks" in refused("--multirun", "learner.num_ranks=interval(1,2.5)")


def test_a_shells_questions_pass():
    register_schema()
    assert check_overrides(["-sc", "query=bash"], config_dir=CONFIG_DIR) == ["-sc", "query=bash"]


def test_the_sweep_that_wandb_schedules_has_parameters_that_compose_and_a_metric_that_a_run_has():
    sweep = yaml.safe_load((CONFIG_DIR / "wandb_sweep.yaml").read_text())
    command = [part for part in sweep["command"] if "=" in part]
    values = {k: p.get("values", [p.get("min"), p.get("max")]) for k, p in sweep["parameters"].items()}
    check("--multirun", *command, *(f"{key}={','.join(map(str, of_key))}" for key, of_key in values.items()))
    assert sweep["metric"]["name"] == EvalConfig().sweep_metric
