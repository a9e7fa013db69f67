from dataclasses import replace

import pytest
from helpers import compose_config

from opd_ray.config.schema import Config
from opd_ray.config.services import FaultConfig
from opd_ray.recovery import Replacements, Restarts, Rollbacks, with_half_micro_batches


class Lost(RuntimeError):
    pass


def restarts(**config: float) -> tuple[Restarts, list[tuple[str, str]], list[float]]:
    told: list[tuple[str, str]] = []
    slept: list[float] = []
    made = Restarts(
        config=FaultConfig(**config), warn=lambda words, kind: told.append((kind, words)), sleep=slept.append
    )
    return made, told, slept


def lose(made: Restarts, step: int) -> None:
    made.after(Lost("lost learner-1"), cause=OSError("the worker's own words"), step=step)


def test_restarts_without_a_new_checkpoint_wait_longer_and_are_limited():
    made, told, slept = restarts(max_restarts=3, backoff_s=2)
    for _ in range(3):
        lose(made, 4)
    with pytest.raises(OSError, match="own words"):
        lose(made, 4)
    assert slept == [2, 4, 8]
    assert made.total == 3
    assert {kind for kind, _ in told} == {"workers_restarted"}
    assert told[1][1] == (
        "lost learner-1: all workers are started again in 4 s, from the checkpoint of update 4 (restart 2 of at most 3"
        " in a row)"
    )


def test_a_new_checkpoint_starts_the_count_again():
    made, _, slept = restarts(max_restarts=1, backoff_s=1)
    for step in (0, 2, 4, 6):
        lose(made, step)
    assert slept == [1, 1, 1, 1]
    with pytest.raises(OSError, match="own words"):
        lose(made, 6)


def test_without_a_checkpoint_it_is_said_that_the_run_starts_again():
    made, told, _ = restarts()
    lose(made, 0)
    assert "from the start, there is no checkpoint" in told[0][1]


def test_no_restarts_means_that_the_first_loss_ends_the_run_with_its_own_cause():
    made, told, _ = restarts(max_restarts=0)
    with pytest.raises(OSError, match="own words"):
        lose(made, 4)
    assert told == []


@pytest.mark.parametrize(
    ("key", "value"), [("max_restarts", -1), ("backoff_s", -1.0), ("backoff_s", float("nan")), ("hang_timeout_s", 0.5)]
)
def test_a_wrong_setting_is_named(key: str, value: float):
    with pytest.raises(ValueError, match=f"fault.{key}={value}: expected"):
        FaultConfig(**{key: value})


def test_workers_that_are_started_anew_in_their_place_are_told_of_and_counted():
    told: list[tuple[str, str]] = []
    made = Replacements(warn=lambda words, kind: told.append((kind, words)))
    assert made.metrics() == {"fault/restarted_workers": 0}
    made.add("teacher-0")
    made.add("rollout-1")
    assert made.metrics() == {"fault/restarted_workers": 2}
    assert [kind for kind, _ in told] == ["worker_restarted"] * 2
    assert told[1][1].startswith("rollout-1 was gone")


def test_updates_that_were_gone_back_from_take_other_prompts_until_a_newer_checkpoint_knows_of_it():
    told: list[tuple[str, str]] = []
    made = Rollbacks(warn=lambda words, kind: told.append((kind, words)))
    assert made.metrics() == {"fault/rollbacks": 0}
    made.add(4, 6)
    made.add(4, 5)
    assert made.metrics() == {"fault/rollbacks": 2}
    assert made.since(2) == made.since(4) == [range(4, 7), range(4, 6)]
    assert made.since(6) == []
    assert told[0] == ("rolled_back", "going back: updates 5 to 7 take other prompts now")


def test_too_little_memory_halves_the_micro_batches_down_to_the_longest_sequence():
    told: list[tuple[str, str]] = []
    config = compose_config(["experiment=demo", "learner.max_tokens_per_micro_batch=1000"])
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    cause = MemoryError("the rank's own words")

    def halved(before: Config) -> Config:
        return with_half_micro_batches(before, cause=cause, warn=lambda words, kind: told.append((kind, words)))

    once = halved(config)
    assert once.learner.max_tokens_per_micro_batch == 500
    assert replace(once, learner=config.learner) == config
    while once.learner.max_tokens_per_micro_batch > longest:
        once = halved(once)
    with pytest.raises(MemoryError, match="own words"):
        halved(once)
    assert told[0] == (
        "micro_batches_halved",
        "a learner rank had too little memory: learner.max_tokens_per_micro_batch=500 now, 1000 before",
    )
