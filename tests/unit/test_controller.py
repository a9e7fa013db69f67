from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from fakes import (
    OF_SORT,
    PROMPTS_PER_STEP,
    SAMPLING,
    SCORE_REQUEST,
    Event,
    FakeCheckpoints,
    FakeEvaluator,
    FakePrompts,
    FakeScreen,
    FakeTracker,
    fake_dispatcher,
    fake_fleets,
)

from opd_ray.controller import Loop
from opd_ray.protocol import Batch, GenerateRequest
from opd_ray.schedule import Schedule
from opd_ray.window import GroupWindow


@dataclass
class Run:
    events: list[Event]
    requests: Sequence[GenerateRequest]
    batches: Sequence[Batch]
    tracker: FakeTracker

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event[0] in kinds]


def run_loop(  # noqa: PLR0913 - each test changes one thing
    *,
    num_steps: int = 4,
    max_staleness: int = 0,
    every: tuple[int, int] = (0, 0),
    first_step: int = 0,
    seed: int = 5,
    prompts: FakePrompts | None = None,
    unrecorded: tuple[int, ...] = (0,),
) -> Run:
    events: list[Event] = []
    held = set(range(first_step + 1)) - set(unrecorded)
    fleets, tracker = fake_fleets(events), FakeTracker(events, held=held)
    eval_every, save_every = every
    schedule = Schedule(num_steps=num_steps, max_staleness=max_staleness, eval_every=eval_every, save_every=save_every)
    Loop(
        schedule=schedule,
        fleets=fleets,
        window=GroupWindow(
            dispatcher=fake_dispatcher(fleets, prompts=prompts, seed=seed),
            schedule=schedule,
            num_prompts=PROMPTS_PER_STEP,
        ),
        screen=FakeScreen(events),
        evaluator=FakeEvaluator(events),
        checkpoints=FakeCheckpoints(events),
        tracker=tracker,
    ).run(first_step)
    return Run(events, fleets.rollout.requests, fleets.learner.batches, tracker)


def test_a_teacher_that_follows_the_student_has_every_version_before_anything_is_scored_with_it():
    run = run_loop(num_steps=3)
    followed = run.of("load", "follow", "score")
    assert [event[:2] for event in followed] == [
        pair for step in range(3) for pair in (("load", step), ("follow", step), ("score", step))
    ] + [("load", 3), ("follow", 3)]


def test_without_staleness_generate_learn_and_publish_alternate_strictly():
    run = run_loop(num_steps=3)
    assert run.of("publish", "load", "generate", "learn") == [
        ("publish", 0),
        ("load", 0),
        ("generate", 0, 0),
        ("learn", 0),
        ("publish", 1),
        ("load", 1),
        ("generate", 1, 1),
        ("learn", 1),
        ("publish", 2),
        ("load", 2),
        ("generate", 2, 2),
        ("learn", 2),
        ("publish", 3),
        ("load", 3),
    ]


def test_with_a_staleness_of_one_the_next_batch_is_under_way_while_the_oldest_is_learned_from():
    run = run_loop(num_steps=3, max_staleness=1)
    assert run.of("generate", "learn", "load") == [
        ("load", 0),
        ("generate", 0, 0),
        ("generate", 1, 0),
        ("learn", 0),
        ("load", 1),
        ("generate", 2, 1),
        ("learn", 1),
        ("load", 2),
        ("learn", 2),
        ("load", 3),
    ]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_the_window_holds_one_batch_more_than_the_staleness_until_the_end_comes_near(max_staleness: int):
    num_in_flight, seen = 0, []
    for event in run_loop(num_steps=6, max_staleness=max_staleness).of("generate", "learn"):
        if event[0] == "learn":
            seen.append(num_in_flight)
        num_in_flight += 1 if event[0] == "generate" else -1
    assert seen == [min(max_staleness + 1, 6 - step) for step in range(6)]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_every_batch_is_learned_once_in_order_and_nothing_is_dispatched_beyond_the_last_step(max_staleness: int):
    run = run_loop(num_steps=5, max_staleness=max_staleness)
    assert [event[1] for event in run.of("learn")] == [0, 1, 2, 3, 4]
    assert [event[1] for event in run.of("generate")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_window_wider_than_the_run_dispatches_only_what_will_be_learned(max_staleness: int):
    run = run_loop(num_steps=1, max_staleness=max_staleness)
    assert run.of("generate", "learn") == [("generate", 0, 0), ("learn", 0)]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_no_request_is_older_than_the_staleness_and_each_asks_for_the_weights_just_loaded(max_staleness: int):
    loaded, ages = -1, []
    for event in run_loop(num_steps=6, max_staleness=max_staleness).of("load", "generate"):
        if event[0] == "load":
            (_, loaded) = event
        else:
            _, step, version = event
            assert version == loaded
            ages.append(step - version)
    assert max(ages) == max_staleness
    assert min(ages) >= 0


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_every_batch_is_scored_right_at_its_dispatch_with_the_objectives_request(max_staleness: int):
    events = run_loop(max_staleness=max_staleness).events
    for place, event in enumerate(events):
        if event[0] == "generate":
            assert events[place + 1] == ("score", event[1], SCORE_REQUEST)
    assert sum(event[0] == "score" for event in events) == 4


def test_the_learner_gets_the_groups_of_its_step_with_their_own_scores():
    run = run_loop(max_staleness=2)
    for step, batch in enumerate(run.batches):
        assert batch.step == step
        assert [handle.group[1] // PROMPTS_PER_STEP for handle in batch.groups] == [step] * PROMPTS_PER_STEP
        assert [s.score for s in batch.scores] == [("score of", g.group) for g in batch.groups]


def test_evaluation_comes_at_the_start_at_its_period_and_at_the_end_after_the_new_weights_are_loaded():
    run = run_loop(num_steps=5, every=(2, 0))
    assert run.of("evaluate") == [("evaluate", 0), ("evaluate", 2), ("evaluate", 4), ("evaluate", 5)]
    for place, event in enumerate(run.events):
        if event[0] == "evaluate":
            assert run.events[place - 2 : place] == [("load", event[1]), ("follow", event[1])]


def test_checkpoints_come_at_their_period_and_at_the_end_after_the_step_is_logged():
    run = run_loop(num_steps=5, every=(0, 2))
    assert run.of("checkpoint") == [("checkpoint", 2), ("checkpoint", 4), ("checkpoint", 5)]
    for place, event in enumerate(run.events):
        if event[0] == "checkpoint":
            assert run.events[place - 1] == ("log", event[1])


def test_no_checkpoint_is_written_when_the_period_is_zero():
    assert run_loop().of("checkpoint") == []


def test_every_step_is_logged_once_with_what_was_learned_loaded_and_evaluated():
    run = run_loop(num_steps=3, every=(2, 0))
    assert run.of("log") == [("log", 0), ("log", 1), ("log", 2), ("log", 3)]
    loaded = {"time/load_s": 0.25, "time/teacher_load_s": 0.5}
    assert run.tracker.metrics[0] == {"eval/accuracy": 0.0}
    assert run.tracker.metrics[1] == {
        "perf/groups_in_flight": 0.0,
        "teacher/bad_groups": 0.0,
        "train/loss": 0.0,
        **loaded,
    }
    assert run.tracker.metrics[2] == run.tracker.metrics[1] | {"train/loss": 1.0, "eval/accuracy": 2.0}


def test_a_step_is_logged_with_the_samples_it_learned_from():
    run = run_loop(num_steps=3, max_staleness=1)
    assert run.tracker.summaries[0] == ()
    assert [[int(s.text) for s in run.tracker.summaries[step]] for step in (1, 2, 3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


def test_resuming_publishes_the_restored_step_first_evaluates_nothing_and_goes_on_from_there():
    run = run_loop(num_steps=5, max_staleness=1, first_step=3)
    assert run.events[:2] == [("publish", 3), ("load", 3)]
    assert run.of("generate", "learn") == [("generate", 3, 3), ("generate", 4, 3), ("learn", 3), ("learn", 4)]
    assert run.of("evaluate") == [("evaluate", 5)]
    assert run.of("log") == [("log", 4), ("log", 5)]


def test_every_batch_is_screened_right_before_it_is_learned_from():
    events = run_loop(max_staleness=1).events
    learned = [place for place, event in enumerate(events) if event[0] == "learn"]
    assert [events[place - 1] for place in learned] == [("screen", step) for step in range(4)]


def test_resuming_where_the_evaluation_was_broken_off_makes_up_for_it_first():
    run = run_loop(num_steps=5, every=(3, 0), first_step=3, unrecorded=(3,))
    assert run.of("evaluate", "log", "learn")[:3] == [("evaluate", 3), ("log", 3), ("learn", 3)]


def test_resuming_a_finished_run_trains_no_more():
    assert run_loop(num_steps=3, first_step=3).of("generate", "learn", "evaluate", "log", "checkpoint") == []


def test_resuming_asks_for_the_very_requests_that_an_unbroken_run_would_have_made():
    whole, resumed = run_loop(num_steps=4), run_loop(num_steps=4, first_step=2)
    later = whole.requests[2 * PROMPTS_PER_STEP :]
    assert [(r.prompt.index, r.seed, r.version) for r in resumed.requests] == [
        (r.prompt.index, r.seed, r.version) for r in later
    ]


def test_the_same_run_seed_gives_the_same_request_seeds_however_stale_and_another_gives_others():
    seeds = [[r.seed for r in run_loop(max_staleness=s).requests] for s in (0, 1, 2)]
    assert seeds[0] == seeds[1] == seeds[2]
    assert not set(seeds[0]) & {r.seed for r in run_loop(seed=6).requests}


def test_no_two_requests_of_a_run_share_a_seed():
    seeds = [r.seed for r in run_loop(num_steps=6).requests]
    assert len(set(seeds)) == len(seeds) == 6 * PROMPTS_PER_STEP


def test_a_prompt_that_comes_again_in_its_batch_or_in_a_later_one_is_sampled_with_another_seed():
    seeds = [r.seed for r in run_loop(num_steps=4, prompts=FakePrompts(always_the_same=True)).requests]
    assert len(set(seeds)) == len(seeds) == 4 * PROMPTS_PER_STEP


def test_every_request_carries_the_runs_sampling_options():
    assert all(request.sampling == SAMPLING for request in run_loop().requests)


def test_every_prompt_is_sampled_as_its_task_says():
    run = run_loop(num_steps=2, prompts=FakePrompts(tasks=("exact", "sort")))
    assert [r.sampling for r in run.requests] == [SAMPLING, OF_SORT] * 3
    assert [g.request.prompt.task for batch in run.batches for g in batch.groups] == ["exact", "sort"] * 3
