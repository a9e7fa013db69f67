from collections.abc import Callable

import pytest
from config_files import CONFIG_DIR, MANDATORY, compose_config, refusal

from opd_ray.config.cli import check_overrides
from opd_ray.config.load import register_schema
from opd_ray.config.objective import (
    BaselineKind,
    DivergenceKind,
    MaskConfig,
    Normalisation,
    ObjectiveConfig,
    ObjectiveKind,
    RatioKind,
    SignalUse,
    SupportSource,
    TailKind,
    WeightConfig,
)


def an_objective(**given: object) -> ObjectiveConfig:
    return ObjectiveConfig(kind=ObjectiveKind.sampled, **given)


NAN = float("nan")
SHARE, ANY_COUNT, OPTIONAL = "a number in [0, 1]", "an integer of at least 1", "a number above 0, or null"
RULES: list[tuple[Callable[..., object], str, object, str]] = [
    *(
        (an_objective, n, given, SHARE)
        for n in ("jsd_beta", "forward_weight", "discount")
        for given in (-0.1, 1.1, NAN)
    ),
    (an_objective, "skew_alpha", -0.1, "a number in [0, 1)"),
    (an_objective, "skew_alpha", 1.0, "a number in [0, 1)"),
    (an_objective, "support_top_p", 0.0, "a number in (0, 1]"),
    (an_objective, "support_top_p", 1.1, "a number in (0, 1]"),
    (an_objective, "reward_clip", 0.0, OPTIONAL),
    (an_objective, "reward_clip", -1.0, OPTIONAL),
    (an_objective, "ratio_cap", 0.0, "a number above 0"),
    (an_objective, "ppo_clip", 0.0, "a number in (0, 1)"),
    (an_objective, "ppo_clip", 1.0, "a number in (0, 1)"),
    (an_objective, "ppo_dual_clip", 1.0, "a number above 1"),
    (an_objective, "task_reward_weight", -0.5, "at least 0"),
    (an_objective, "top_k", 0, ANY_COUNT),
    (an_objective, "chunk_tokens", 0, ANY_COUNT),
    (an_objective, "diagnostic_tokens", -1, "an integer of at least 0"),
    (MaskConfig, "mask.text", ["ok", ""], "texts of at least one character"),
    (WeightConfig, "weight.half_life_tokens", 0.0, OPTIONAL),
    (WeightConfig, "weight.half_life_tokens", -5.0, OPTIONAL),
    (WeightConfig, "weight.drift_rate", -0.1, "a number of at least 0"),
    (WeightConfig, "weight.entropy_fraction", 0.0, "1e-06 to 1"),
    (WeightConfig, "weight.entropy_fraction", 1.1, "1e-06 to 1"),
]


@pytest.mark.parametrize(("build", "key", "given", "expected"), RULES)
def test_a_value_outside_its_range_is_refused_by_key_value_and_expectation(
    build: Callable[..., object], key: str, given: object, expected: str
):
    words = refusal(lambda: build(**{key.rpartition(".")[2]: given}))
    assert words == f"objective.{key}={given}: expected {expected}"


@pytest.mark.parametrize(
    ("build", "name", "values"),
    [
        *((an_objective, name, (0.0, 1.0)) for name in ("jsd_beta", "forward_weight", "discount")),
        (an_objective, "skew_alpha", (0.0, 0.999)),
        (an_objective, "support_top_p", (0.001, 1.0)),
        (an_objective, "reward_clip", (None, 0.001)),
        (an_objective, "task_reward_weight", (0.0,)),
        (an_objective, "top_k", (1,)),
        (an_objective, "chunk_tokens", (1,)),
        (an_objective, "diagnostic_tokens", (0,)),
        (MaskConfig, "format", (None, "", r"\d+$")),
        (MaskConfig, "text", ([], ["x"])),
        (WeightConfig, "half_life_tokens", (None, 0.5, float("inf"))),
        (WeightConfig, "drift_rate", (0.0,)),
        (WeightConfig, "entropy_fraction", (0.01, 1.0)),
    ],
)
def test_the_edges_of_a_range_are_taken(build: Callable[..., object], name: str, values: tuple[object, ...]):
    for value in values:
        assert getattr(build(**{name: value}), name) == value


def test_a_bad_regular_expression_is_refused_with_what_is_wrong_in_it():
    words = refusal(lambda: MaskConfig(format="(a"))
    assert words.startswith("objective.mask.format='(a': expected a regular expression (")
    assert "unterminated subpattern at position 0" in words


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.discount=1.5", "objective.discount=1.5: expected a number in [0, 1]"),
        ("objective.mask.text=['']", "objective.mask.text=['']: expected texts of at least one character"),
        ("objective.weight.drift_rate=-1", "objective.weight.drift_rate=-1.0: expected a number of at least 0"),
    ],
)
def test_the_rules_of_the_blocks_hold_on_the_command_line(override: str, words: str):
    assert refusal(lambda: compose_config(*MANDATORY, override)) == words


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ('objective.mask.tokens=["<eos>"]', "mask.tokens", ["<eos>"]),
        ('objective.mask.tokens=["<|im_end|>","<|endoftext|>"]', "mask.tokens", ["<|im_end|>", "<|endoftext|>"]),
        ("objective.mask.tokens=[7]", "mask.tokens", ["7"]),
        ('objective.mask.text=["Wait, ","a b"]', "mask.text", ["Wait, ", "a b"]),
        (r'objective.mask.format="\\boxed\{.*\}"', "mask.format", r"\\boxed\{.*\}"),
        ("objective.mask.format=null", "mask.format", None),
        ('objective.equivalent_tokens=[["<eos>","<pad>"]]', "equivalent_tokens", [["<eos>", "<pad>"]]),
        (
            'objective.equivalent_tokens=[["<eos>","<pad>"],["0","1","2"]]',
            "equivalent_tokens",
            [["<eos>", "<pad>"], list("012")],
        ),
        ("objective.reward_clip=null", "reward_clip", None),
        ("objective.reward_clip=5", "reward_clip", 5.0),
        ("objective.weight.half_life_tokens=100", "weight.half_life_tokens", 100.0),
        ("objective.weight.half_life_tokens=null", "weight.half_life_tokens", None),
        ("objective.weight.entropy_fraction=0.2", "weight.entropy_fraction", 0.2),
        ("objective.normalisation=sequence_mean", "normalisation", Normalisation.sequence_mean),
    ],
)
def test_an_override_of_the_objective_composes(override: str, key: str, expected: object):
    value: object = checked("objective=sampled", override)
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "override",
    ["objective.mask.tokens=[<eos>]", "objective.equivalent_tokens=[[<eos>,<pad>]]", "objective.mask.tokens=<eos>"],
)
def test_a_token_with_special_characters_is_refused_unquoted_with_the_quotes_that_it_needs(override: str):
    words = refusal(lambda: checked(override))
    assert words.startswith(f"{override}: ")
    assert """key='"value"', key='["value"]'""" in words


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("objective.use_as", SignalUse),
        ("objective.divergence", DivergenceKind),
        ("objective.support", SupportSource),
        ("objective.tail", TailKind),
        ("objective.baseline", BaselineKind),
        ("objective.ratio", RatioKind),
        ("objective.normalisation", Normalisation),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(key: str, choices: type):
    words = refusal(lambda: checked(f"{key}=nope"))
    assert words.startswith(f"{key}: ")
    assert "'nope'" in words
    assert all(choice.value in words for choice in choices)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("objective.mask.token=[a]", "objective.mask.tokens"),
        ("objective.weight.half_life=3", "objective.weight.half_life_tokens"),
        ("objective.topk=3", "objective.top_k"),
    ],
)
def test_a_misspelt_key_of_the_objective_is_refused_with_the_one_that_is_meant(override: str, meant: str):
    assert f"did you mean {meant}?" in refusal(lambda: checked(override))


def test_two_objectives_share_no_block():
    one, other = an_objective(), an_objective()
    assert one.mask is not other.mask
    assert one.mask.tokens is not other.mask.tokens
    assert one.weight is not other.weight
    assert one.equivalent_tokens is not other.equivalent_tokens


def checked(*overrides: str) -> ObjectiveConfig:
    """Return the objective of a command line that has passed the check before the start."""
    register_schema()
    check_overrides([*MANDATORY, *overrides], config_dir=CONFIG_DIR)
    return compose_config(*MANDATORY, *overrides).objective


@pytest.mark.parametrize("classes", [[["a"]], [["a", "b"], ["b", "c"]]])
def test_classes_of_equivalent_tokens_are_disjoint_and_have_two_members(classes: list[list[str]]):
    with pytest.raises(ValueError, match=r"objective\.equivalent_tokens=.*: expected disjoint classes of at least two"):
        ObjectiveConfig(kind=ObjectiveKind.full, equivalent_tokens=classes)


def test_an_endless_drift_rate_is_refused():
    with pytest.raises(ValueError, match=r"objective\.weight\.drift_rate=inf: expected a number of at least 0"):
        WeightConfig(drift_rate=float("inf"))
