from collections.abc import Callable

import pytest
from fakes import OF_SORT, PROMPTS_PER_STEP, SAMPLING, FakePrompts, FakeQuarantine, fake_dispatcher, fake_fleets

from opd_ray.controller import Fleets
from opd_ray.dispatch import Place
from opd_ray.protocol import Batch, CannotGoOn
from opd_ray.screen import TeacherScreen

STEP = 4
FIRST = STEP * PROMPTS_PER_STEP  # index of the batch's first prompt; replacements have 1000 * attempt more
Fault = Callable[[int, int], str]


def bad(*indices: int) -> Fault:
    return lambda index, _: f"NaN at {index}" if index in indices else ""


def screen_of(fault: Fault, *, fraction: float = 1.0, seed: int = 5) -> tuple[TeacherScreen, Fleets, FakeQuarantine]:
    fleets, quarantine = fake_fleets([]), FakeQuarantine()
    fleets.teacher.fault = fault
    screen = TeacherScreen(
        dispatcher=fake_dispatcher(fleets, prompts=FakePrompts(tasks=("exact", "sort")), seed=seed),
        max_bad_fraction=fraction,
        quarantine=quarantine,
    )
    return screen, fleets, quarantine


def dispatch(screen: TeacherScreen) -> Batch:
    """Start a batch as the loop does."""
    places = [Place(STEP, position) for position in range(PROMPTS_PER_STEP)]
    flights = screen.dispatcher.start(places, version=STEP - 1)
    return Batch(step=STEP, groups=[f.group for f in flights], scores=[f.score for f in flights])


def indices(batch: Batch) -> list[int]:
    return [group.group[1] for group in batch.groups]


def test_a_good_batch_passes_as_it_is_and_nothing_more_is_asked_for():
    screen, fleets, quarantine = screen_of(bad())
    batch = dispatch(screen)
    whole, metrics = screen.whole(batch)
    assert whole == batch
    assert len(fleets.rollout.requests) == PROMPTS_PER_STEP
    assert quarantine.groups == []
    assert metrics["teacher/bad_groups"] == 0
    assert set(metrics) == {"teacher/bad_groups", "time/wait_rollout_s", "time/wait_teacher_s"}
    assert min(metrics.values()) >= 0


def test_a_bad_group_is_replaced_in_its_place_and_scored_and_the_others_stay():
    screen, _, _ = screen_of(bad(FIRST + 1))
    batch = dispatch(screen)
    whole, metrics = screen.whole(batch)
    assert whole.step == STEP
    assert indices(whole) == [FIRST, 1000 + FIRST + 1, FIRST + 2]
    assert [score.score for score in whole.scores] == [("score of", group.group) for group in whole.groups]
    assert (whole.groups[0], whole.scores[2]) == (batch.groups[0], batch.scores[2])
    assert metrics["teacher/bad_groups"] == 1


def test_a_replacement_is_of_the_same_task_sampled_as_its_task_says_by_the_current_policy():
    screen, fleets, _ = screen_of(bad(FIRST + 1, FIRST + 2))
    screen.whole(dispatch(screen))
    replaced, added = fleets.rollout.requests[1:PROMPTS_PER_STEP], fleets.rollout.requests[PROMPTS_PER_STEP:]
    assert [r.prompt.task for r in added] == [r.prompt.task for r in replaced]
    assert [r.sampling for r in added] == [r.sampling for r in replaced]
    assert {r.sampling for r in added} == {SAMPLING, OF_SORT}
    assert [r.version for r in added] == [STEP, STEP]


def test_a_bad_replacement_is_counted_and_replaced_again():
    screen, _, quarantine = screen_of(bad(FIRST, 1000 + FIRST))
    whole, metrics = screen.whole(dispatch(screen))
    assert indices(whole) == [2000 + FIRST, FIRST + 1, FIRST + 2]
    assert metrics["teacher/bad_groups"] == 2
    assert [group.reason for group in quarantine.groups] == [f"NaN at {FIRST}", f"NaN at {1000 + FIRST}"]


def test_the_quarantine_learns_what_reproduces_a_group():
    screen, fleets, quarantine = screen_of(bad(FIRST, 1000 + FIRST))
    screen.whole(dispatch(screen))
    of_bad = [fleets.rollout.requests[0], fleets.rollout.requests[PROMPTS_PER_STEP]]
    for group, request in zip(quarantine.groups, of_bad, strict=True):
        assert (group.step, group.held_out, group.teacher) == (STEP + 1, False, "teacher")
        assert group.seed == request.seed
        assert group.summary.prompt_index == request.prompt.index
        assert group.summary.task == request.prompt.task


def test_the_same_faults_lead_to_the_same_requests_and_every_attempt_has_a_seed_of_its_own():
    runs = []
    for seed in (5, 5, 6):
        screen, fleets, _ = screen_of(bad(FIRST, 1000 + FIRST, FIRST + 2), seed=seed)
        screen.whole(dispatch(screen))
        runs.append([(r.prompt.index, r.seed) for r in fleets.rollout.requests])
    assert runs[0] == runs[1]
    assert {seed for _, seed in runs[0]}.isdisjoint(seed for _, seed in runs[2])
    assert len({seed for _, seed in runs[0]}) == len(runs[0]) == PROMPTS_PER_STEP + 3


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.01, 1), (0.5, 1), (2 / 3, 2), (1.0, 3)])
def test_so_many_bad_groups_are_replaced_and_one_more_ends_the_run(fraction: float, allowed: int):
    screen, _, _ = screen_of(bad(*range(FIRST, FIRST + allowed)), fraction=fraction)
    assert screen.whole(dispatch(screen))[1]["teacher/bad_groups"] == allowed
    screen, _, _ = screen_of(bad(*range(FIRST, FIRST + 3), 1000 + FIRST), fraction=fraction)
    with pytest.raises(CannotGoOn, match=rf"max_bad_fraction={fraction:g} allows {allowed} of 3"):
        screen.whole(dispatch(screen))


def test_a_fraction_is_not_lost_to_rounding():
    screen, _, _ = screen_of(bad(FIRST, FIRST + 1, FIRST + 2), fraction=1 - 1e-12)
    assert screen.whole(dispatch(screen))[1]["teacher/bad_groups"] == 3


def test_a_teacher_that_can_score_nothing_ends_the_run_with_cause_count_and_place():
    screen, _, quarantine = screen_of(lambda *_: "NaN everywhere")
    with pytest.raises(CannotGoOn) as caught:
        screen.whole(dispatch(screen))
    words = str(caught.value)
    assert words.startswith(f"update {STEP + 1}: 6 groups could not be scored")
    assert "by teacher: teacher 6" in words
    assert "the first: NaN everywhere" in words
    assert quarantine.where in words
    assert len(quarantine.groups) == 6
