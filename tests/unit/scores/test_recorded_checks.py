from pathlib import Path
from typing import Any

import pytest
from config_files import MANDATORY, compose_config, refusal
from recordings import MODELS, TOKENIZER, FakeTokenizer, make_recorded_group, make_scored, record

from opd_ray.config.schema import Config
from opd_ray.replay import replayed
from opd_ray.requests import score_request
from opd_ray.scores.checks import check_offered, check_recording

SUPPORT = (*MANDATORY, "objective=support", "objective.top_k=4")
SCORED = make_scored(make_recorded_group(1, 2))


def offline(folder: Path, *overrides: str) -> Config:
    return compose_config(*MANDATORY, "teacher=cache", f"teacher.cache.path={folder}", *overrides)


def check(folder: Path, *overrides: str, scored: Any = SCORED, recorded: tuple[str, ...] = (), **models: Any) -> None:
    """Record under one configuration and check that against another."""
    recording = record(folder, compose_config(*SUPPORT, *recorded), [[scored]])
    known = {"tokenizer": TOKENIZER, "vocab_size": 14, "equivalent_ids": (), **models}
    config = offline(folder, "objective=support", "objective.top_k=4", *overrides)
    check_offered(score_request(config.objective), recording.manifest, where="the cache")
    check_recording(config, recording, **known)


@pytest.mark.parametrize(
    ("overrides", "recorded"),
    [
        ([], []),
        (["rollout.temperature=0.7"], ["rollout.temperature=0.7"]),
        (["objective.tail=bucket", "objective.divergence=jsd"], ["objective.tail=bucket"]),
        ([], ["objective.tail=bucket"]),  # whole log-probs serve where a constant would not matter
        (["objective=sampled"], ["objective.weight.drift_rate=1"]),
        (["objective=sampled", "objective.ratio=ppo"], ["objective=sampled"]),
        (["rollout.samples_per_prompt=1"], []),  # what was recorded counts
    ],
)
def test_a_recording_that_holds_what_is_asked_passes(tmp_path: Path, overrides: list[str], recorded: list[str]):
    check(tmp_path, *overrides, recorded=tuple(recorded))


@pytest.mark.parametrize(
    ("overrides", "recorded", "words"),
    [
        (["objective.top_k=8"], [], "objective.top_k=8: the cache was recorded with 4; expected that"),
        (["objective.support=union"], [], "objective.support=union: the cache was recorded with teacher"),
        (["objective.support_top_p=0.5"], [], "objective.support_top_p=0.5"),
        (["objective.include_sampled=true"], [], "objective.include_sampled=True"),
        (["objective.tail=bucket"], [], "expected objective.tail=renormalise"),
        (["objective=full"], [], "holds support payloads, and this objective needs hidden; expected objective=support"),
        (["objective=support"], ["objective=full"], "holds hidden payloads, and this objective needs support"),
        (["objective=sampled"], [], "holds support payloads without the sampled tokens' log-probs"),
        (["objective.weight.drift_rate=1"], [], "without the sampled tokens' log-probs"),
        (
            ["rollout.temperature=0.7"],
            [],
            "recorded at rollout.temperature=1; expected the same of this run, given 0.7",
        ),
        (["data.max_prompt_tokens=1"], [], "data.max_prompt_tokens=1: teacher.cache.path"),
        (["rollout.max_response_tokens=1"], [], "holds a response of 2 tokens; expected at least that"),
        (
            ["objective=sampled", "rollout.top_p=0.9"],
            ["objective=sampled"],
            "rollout.top_p=0.9: teacher.cache.path=",
        ),
    ],
)
def test_a_recording_that_does_not_is_refused_with_the_key_to_change(
    tmp_path: Path, overrides: list[str], recorded: list[str], words: str
):
    message = refusal(lambda: check(tmp_path, *overrides, recorded=tuple(recorded)))
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "models", [{"tokenizer": FakeTokenizer("a", "c", "b")}, {"vocab_size": 13}], ids=["another map", "fewer rows"]
)
def test_another_vocabulary_is_refused(tmp_path: Path, models: dict[str, Any]):
    assert "was recorded over another vocabulary" in refusal(lambda: check(tmp_path, **models))


def test_other_classes_of_equivalent_tokens_are_refused(tmp_path: Path):
    assert "objective.equivalent_tokens" in refusal(lambda: check(tmp_path, equivalent_ids=((0, 1),)))


def test_responses_that_are_compared_must_be_several_and_have_rewards(tmp_path: Path):
    single = make_scored(make_recorded_group(1, responses=[[5]], rewards=0))
    baseline = ["objective=sampled", "objective.baseline=group_mean"]
    words = refusal(lambda: check(tmp_path, *baseline, scored=single, recorded=("objective=sampled",)))
    assert "holds prompts with a single response" in words
    unrewarded = make_scored(make_recorded_group(1, rewards=0))
    rewarded = ["objective=sampled", "objective.task_reward_weight=1"]
    words = refusal(lambda: check(tmp_path, *rewarded, scored=unrewarded, recorded=("objective=sampled",)))
    assert "holds responses without a reward; expected 0" in words


def test_an_empty_recording_is_refused(tmp_path: Path):
    recording = record(tmp_path, compose_config(*SUPPORT), [])
    words = refusal(
        lambda: check_recording(offline(tmp_path), recording, tokenizer=TOKENIZER, vocab_size=14, equivalent_ids=())
    )
    assert "no update was recorded there" in words


def test_a_damaged_shard_is_refused_unless_checksums_are_not_wanted(tmp_path: Path):
    recording = record(tmp_path, compose_config(*SUPPORT), [[SCORED]])
    shard = tmp_path / recording.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    known: dict[str, Any] = {"tokenizer": TOKENIZER, "vocab_size": 14, "equivalent_ids": ()}
    overrides = ["objective=support", "objective.top_k=4"]
    assert "is damaged" in refusal(lambda: check_recording(offline(tmp_path, *overrides), recording, **known))
    check_recording(offline(tmp_path, *overrides, "teacher.cache.verify=false"), recording, **known)


def test_a_recording_in_the_runs_own_folder_is_refused(tmp_path: Path):
    config = offline(tmp_path / "run" / "scores", f"runs_dir={tmp_path}")
    prompts: Any = None
    ids: Any = None
    words = refusal(lambda: replayed(config, models=MODELS, prompts=prompts, ids=ids))
    assert "lies in this run's own folder" in words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.on_skipped_steps=rollback"], "learner.on_skipped_steps=rollback with kind=cache: expected end"),
        (["objective=sampled", "objective.ratio=none"], "objective.ratio=none with objective=sampled and kind=cache"),
        (["record_scores=true"], "record_scores=true with kind=cache"),
        (["teacher.evaluate=true"], "evaluate=True: expected none and false"),
        (["teacher.alignment=bytes", "objective=sampled"], "alignment=bytes"),
        (
            ["+teachers={sort: {path: a}, copy: {path: b, kind: cache, cache: {path: c}}}"],
            "teachers.sort.cache.path=None; teachers.copy.cache.path=c: expected the same of all teachers",
        ),
        (["teacher.kind=vllm"], "expected path exactly with kind=cache"),
    ],
)
def test_rules_over_the_keys_of_a_cache(tmp_path: Path, overrides: list[str], words: str):
    assert words in refusal(lambda: offline(tmp_path, *overrides))
