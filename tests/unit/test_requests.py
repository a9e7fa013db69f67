import pytest
from config_files import MANDATORY, compose_config, refusal
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from opd_ray.config.objective import BaselineKind, MaskConfig, ObjectiveConfig, ObjectiveKind, TailKind, WeightConfig
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions
from opd_ray.protocol import Payload, SamplingOptions, ScoreRequest
from opd_ray.requests import (
    ObjectiveIds,
    check_offered,
    held_out_samples,
    objective_ids,
    score_request,
    training_samples,
)

DRIFT = WeightConfig(drift_rate=0.1)
EOS, PAD = 12, 13  # of the tiny models' tokenizer, where the id of a digit is the digit


def asked_by(kind: str, **given: object) -> ScoreRequest:
    return score_request(ObjectiveConfig(kind=ObjectiveKind(kind), **given))


def unusable_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose decoder puts spaces between tokens: the text of one token is not defined."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("baseline", [BaselineKind.none, BaselineKind.group_mean])
@pytest.mark.parametrize("weight", [WeightConfig(), DRIFT])
def test_the_sampled_objective_asks_for_four_bytes_a_token(baseline: BaselineKind, weight: WeightConfig):
    assert asked_by("sampled", baseline=baseline, weight=weight) == ScoreRequest(payload=Payload.sampled)


def test_the_exact_baseline_needs_hidden_states_and_drift_the_sampled_logprobs_beside_them():
    assert asked_by("sampled", baseline=BaselineKind.kl) == ScoreRequest(payload=Payload.hidden)
    assert asked_by("sampled", baseline=BaselineKind.kl, weight=DRIFT) == ScoreRequest(
        payload=Payload.hidden, sampled_logprobs=True
    )


def test_the_full_objective_asks_for_hidden_states_and_with_drift_for_the_sampled_logprobs():
    assert asked_by("full") == ScoreRequest(payload=Payload.hidden)
    assert asked_by("full", weight=DRIFT) == ScoreRequest(payload=Payload.hidden, sampled_logprobs=True)
    assert asked_by("full", tail=TailKind.sampled_corrected) == ScoreRequest(payload=Payload.hidden)


@pytest.mark.parametrize(
    ("tail", "normalised", "sampled_logprobs"),
    [
        ("renormalise", False, False),
        ("bucket", True, False),
        ("sampled_corrected", True, True),
        ("sampled_uncorrected", True, True),
        ("none", True, False),
    ],
)
def test_the_tail_says_whether_logprobs_are_normalised_and_those_of_the_sampled_tokens_needed(
    tail: str, normalised: bool, sampled_logprobs: bool
):
    request = asked_by("support", tail=TailKind(tail))
    assert request == ScoreRequest(
        payload=Payload.support, top_k=32, normalised=normalised, sampled_logprobs=sampled_logprobs
    )
    with_drift = asked_by("support", tail=TailKind(tail), weight=DRIFT)
    assert (with_drift.normalised, with_drift.sampled_logprobs) == (normalised, True)


@pytest.mark.parametrize("source", ["teacher", "student", "union"])
def test_the_support_is_asked_for_as_configured(source: str):
    config = compose_config(
        *MANDATORY,
        "objective=support",
        f"objective.support={source}",
        "objective.top_k=7",
        "objective.support_top_p=0.9",
        "objective.include_sampled=true",
        "objective.tail=bucket",
    )
    assert score_request(config.objective) == ScoreRequest(
        payload=Payload.support, support=source, top_k=7, top_p=0.9, include_sampled=True
    )


@pytest.mark.parametrize("kind", ObjectiveKind)
@pytest.mark.parametrize("baseline", BaselineKind)
def test_the_teacher_is_asked_for_the_signal_that_the_objective_reads(kind: ObjectiveKind, baseline: BaselineKind):
    options = ObjectiveOptions(policy=PolicyOptions(kl_baseline=baseline is BaselineKind.kl))
    assert asked_by(kind, baseline=baseline).payload == OBJECTIVES[kind.value].payload(options)


SAMPLING = (
    *MANDATORY,
    "rollout.samples_per_prompt=3",
    "eval.samples_per_prompt=5",
    "rollout.max_response_tokens=17",
    "rollout.temperature=0.7",
)


def training_options(*overrides: str) -> SamplingOptions:
    return training_samples(
        compose_config(*SAMPLING, "objective.top_k=7", "objective.support_top_p=0.9", *overrides), "sort"
    )


@pytest.mark.parametrize("source", ["student", "union"])
def test_responses_carry_the_students_likeliest_tokens_where_they_make_the_support(source: str):
    assert training_options("objective=support", f"objective.support={source}") == SamplingOptions(
        num_samples=3, max_response_tokens=17, temperature=0.7, top_p=1.0, support_size=7, support_top_p=0.9
    )


@pytest.mark.parametrize(
    ("kind", "source"),
    [("support", "teacher"), ("full", "teacher"), ("full", "union"), ("sampled", "teacher"), ("sampled", "student")],
)
def test_responses_carry_no_support_where_the_student_has_no_part_in_it(kind: str, source: str):
    assert training_options(f"objective={kind}", f"objective.support={source}").support_size == 0


def test_held_out_responses_are_drawn_as_in_training_but_carry_no_support():
    config = compose_config(*SAMPLING, "objective=support", "objective.support=student", "objective.support_top_p=0.9")
    assert held_out_samples(config, "sort") == SamplingOptions(
        num_samples=5, max_response_tokens=17, temperature=0.7, top_p=1.0, support_size=0, support_top_p=1.0
    )


def test_the_nucleus_of_sampling_is_that_of_the_rollout_and_not_of_the_support():
    config = compose_config(*MANDATORY, "rollout.top_p=0.8", "objective.support_top_p=0.9")
    assert training_samples(config, "sort").top_p == held_out_samples(config, "sort").top_p == 0.8


def ids_of(**given: object) -> ObjectiveIds:
    return objective_ids(ObjectiveConfig(kind=ObjectiveKind.full, **given), tokenizer=build_tokenizer())


def test_tokens_are_found_by_their_text_and_keep_their_order_and_classes():
    assert ids_of() == ObjectiveIds(masked=(), equivalent=())
    assert ids_of(mask=MaskConfig(tokens=["<pad>", "7", "<eos>"])).masked == (PAD, 7, EOS)
    assert ids_of(equivalent_tokens=[["<eos>", "<pad>"], ["2", "1", "0"]]).equivalent == ((EOS, PAD), (2, 1, 0))


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("mask.tokens", {"mask": MaskConfig(tokens=["<eos>", "<|im_end|>"])}),
        ("equivalent_tokens", {"equivalent_tokens": [["<eos>", "<pad>"], ["0", "<|im_end|>"]]}),
    ],
)
def test_a_text_that_is_no_token_is_refused_by_key_and_text(key: str, given: dict[str, object]):
    words = refusal(lambda: ids_of(**given))
    assert words.startswith(f"objective.{key} names '<|im_end|>', which is no token of the student's vocabulary")
    assert "objective.mask.text" in words


def test_equivalent_tokens_beyond_the_common_vocabulary_are_refused_by_key_and_text():
    def ids(vocab_size: int) -> ObjectiveIds:
        config = ObjectiveConfig(kind=ObjectiveKind.full, equivalent_tokens=[["0", "<pad>"]])
        return objective_ids(config, tokenizer=build_tokenizer(), vocab_size=vocab_size)

    assert ids(PAD + 1).equivalent == ((0, PAD),)
    words = refusal(lambda: ids(PAD))
    assert words.startswith(f"objective.equivalent_tokens names '<pad>', id {PAD}: expected ids below {PAD}, the")


def test_two_tokens_in_one_text_are_no_token():
    assert "names '12'" in refusal(lambda: ids_of(mask=MaskConfig(tokens=["12"])))


@pytest.mark.parametrize("mask", [MaskConfig(text=["a"]), MaskConfig(format="a")])
def test_masks_by_text_are_refused_on_a_tokenizer_whose_tokens_have_no_text_of_their_own(mask: MaskConfig):
    config = ObjectiveConfig(kind=ObjectiveKind.full, mask=mask)
    assert "its decoder is " in refusal(lambda: objective_ids(config, tokenizer=unusable_tokenizer()))
    assert objective_ids(config, tokenizer=build_tokenizer()).masked == ()


def test_masks_by_token_need_no_text():
    config = ObjectiveConfig(kind=ObjectiveKind.full, mask=MaskConfig(tokens=["b"]))
    assert objective_ids(config, tokenizer=unusable_tokenizer()).masked == (1,)


API_ONLY = frozenset({Payload.sampled, Payload.support})  # a teacher behind an interface that gives log-probs alone


@pytest.mark.parametrize("request_", [asked_by("full"), asked_by("sampled", baseline=BaselineKind.kl)])
def test_hidden_states_are_refused_from_a_teacher_that_gives_logprobs_only(request_: ScoreRequest):
    words = refusal(lambda: check_offered(request_, offered=API_ONLY, teacher="models/big"))
    assert words == (
        "teacher models/big gives only sampled, support: objective=full and objective.baseline=kl need the teacher's"
        " hidden states; change objective or teacher"
    )


@pytest.mark.parametrize(
    ("kind", "offered", "needs"),
    [
        ("support", Payload.sampled, "objective=support needs the teacher's log-probs on a set of tokens"),
        ("sampled", Payload.support, "objective=sampled needs the teacher's log-prob of the sampled token"),
    ],
)
def test_each_payload_is_refused_by_what_needs_it(kind: str, offered: Payload, needs: str):
    words = refusal(lambda: check_offered(asked_by(kind), offered=frozenset({offered}), teacher="t"))
    assert words == f"teacher t gives only {offered}: {needs}; change objective or teacher"


@pytest.mark.parametrize("kind", ["sampled", "support"])
def test_what_a_teacher_offers_passes(kind: str):
    check_offered(asked_by(kind), offered=API_ONLY, teacher="models/big")
    check_offered(asked_by("full"), offered=frozenset(Payload), teacher="models/big")
