"""Which groups an update learns from, with and without overprovisioning."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import PROMPTS_PER_STEP, FakeRollout, fake_fleets, fake_window

from opd_ray.protocol import Batch
from opd_ray.window import GroupWindow

NEVER: Callable[[int], bool] = lambda _index: False  # noqa: E731 - a constant


def window_of(
    *, num_steps: int = 6, max_staleness: int = 1, overprovision: float = 0.67, slow: Callable[[int], bool] = NEVER
) -> tuple[GroupWindow, FakeRollout]:
    """Return a window; two groups of three beyond a batch are in flight."""
    fleets = fake_fleets([])
    fleets.rollout.slow = slow
    return (
        fake_window(fleets, num_steps=num_steps, max_staleness=max_staleness, overprovision=overprovision),
        fleets.rollout,
    )


def learn(window: GroupWindow, step: int) -> tuple[list[int], list[int]]:
    """Take a batch and learn from it; return its prompts and how many updates old their requests are."""
    window.fill(step)
    batch, _ = window.take(step)
    window.release()
    return indices(batch), [step - g.request.version for g in batch.groups]


def indices(batch: Batch) -> list[int]:
    return [group.request.prompt.index for group in batch.groups]


def test_an_update_takes_the_groups_that_finish_first_and_the_slow_one_is_for_the_next():
    window, _ = window_of(slow=lambda index: index == 1)
    assert learn(window, 0)[0] == [0, 2, 3]
    assert learn(window, 1)[0] == [1, 4, 5]


def test_what_is_left_runs_on_and_is_not_asked_for_again():
    window, rollout = window_of(slow=lambda index: index == 1)
    for step in range(6):
        learn(window, step)
    asked = [request.prompt.index for request in rollout.requests]
    assert asked == sorted(set(asked))


@pytest.mark.parametrize("overprovision", [0.34, 0.67, 1.0])
@pytest.mark.parametrize("max_staleness", [1, 2, 3])
def test_every_place_is_learned_once_and_none_is_older_than_the_staleness(overprovision: float, max_staleness: int):
    window, _ = window_of(
        max_staleness=max_staleness, overprovision=overprovision, num_steps=20, slow=lambda index: index % 3 == 1
    )
    learned = [learn(window, step) for step in range(20)]
    assert sorted(index for batch, _ in learned for index in batch) == list(range(20 * PROMPTS_PER_STEP))
    assert all(len(batch) == PROMPTS_PER_STEP for batch, _ in learned)
    assert max(age for _, ages in learned for age in ages) <= max_staleness


def test_a_group_that_is_due_is_taken_though_it_is_slow():
    window, _ = window_of(max_staleness=1, slow=lambda index: index == 1)
    learn(window, 0)
    indices_of_next, ages = learn(window, 1)
    assert indices_of_next[0] == 1
    assert ages == [1, 1, 0]


def test_with_more_staleness_a_slow_group_may_be_left_more_than_once():
    window, _ = window_of(max_staleness=3, slow=lambda index: index == 1)
    assert [1 in learn(window, step)[0] for step in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("overprovision", [0.34, 0.67, 1.0])
def test_in_flight_are_the_batch_and_the_fraction_beyond_it(overprovision: float):
    window, rollout = window_of(overprovision=overprovision)
    beyond = int(overprovision * PROMPTS_PER_STEP)
    for step in range(3):
        window.fill(step)
        assert len(rollout.requests) == (step + 1) * PROMPTS_PER_STEP + beyond
        _, metrics = window.take(step)
        assert metrics["perf/groups_in_flight"] == beyond
        window.release()


def test_carried_groups_are_counted():
    window, _ = window_of(slow=lambda index: index == 1)
    window.fill(0)
    assert window.take(0)[1]["rollout/carried_groups"] == 0
    window.release()
    window.fill(1)
    assert window.take(1)[1]["rollout/carried_groups"] == 1


@pytest.mark.parametrize("overprovision", [0.0, 0.67])
def test_a_restored_window_learns_every_place_that_was_not_learned(tmp_path: Path, overprovision: float):
    def slow(index: int) -> bool:
        return index == 4

    first, _ = window_of(overprovision=overprovision, slow=slow)
    before = [index for step in range(3) for index in learn(first, step)[0]]
    first.save(str(tmp_path))
    second, rollout = window_of(overprovision=overprovision, slow=slow)
    second.restore(str(tmp_path))
    after = [index for step in range(3, 6) for index in learn(second, step)[0]]
    assert sorted(before + after) == list(range(6 * PROMPTS_PER_STEP))
    assert {request.version for request in rollout.requests} <= {3, 4, 5}


def test_what_is_taken_and_not_learned_from_is_restored_too(tmp_path: Path):
    first, _ = window_of()
    learn(first, 0)
    first.fill(1)
    first.take(1)
    first.save(str(tmp_path))
    second, _ = window_of()
    second.restore(str(tmp_path))
    later = [index for step in range(1, 6) for index in learn(second, step)[0]]
    assert sorted(later) == list(range(PROMPTS_PER_STEP, 6 * PROMPTS_PER_STEP))


def test_a_checkpoint_of_batches_of_another_size_is_refused_by_key(tmp_path: Path):
    window, _ = window_of()
    window.fill(0)
    window.save(str(tmp_path))
    window.num_prompts = 5
    with pytest.raises(ValueError, match=r"batch\.num_prompts=5: .* was written with 3"):
        window.restore(str(tmp_path))


def test_updates_that_are_retaken_have_other_prompts_each_time_which_a_restored_window_remembers(tmp_path: Path):
    def rest(*retaken: range) -> list[list[int]]:
        window, _ = window_of(overprovision=0.0)
        window.restore(str(tmp_path))
        for steps in retaken:
            window.retake(steps)
        learned = [learn(window, step)[0] for step in range(3, 5)]
        window.save(str(tmp_path))
        return [*learned, learn(window, 5)[0]]

    window, _ = window_of(overprovision=0.0)
    for step in range(3):
        learn(window, step)
    window.save(str(tmp_path))
    at_three = (tmp_path / "window.json").read_text()
    usual = [list(range(3 * step, 3 * step + 3)) for step in range(3, 6)]
    assert rest() == usual
    (tmp_path / "window.json").write_text(at_three)
    once, twice = [[1009 * n * 1000 + index for index in usual[1]] for n in (1, 2)]
    assert rest(range(4, 5)) == [usual[0], once, usual[2]]
    (tmp_path / "window.json").write_text(at_three)
    assert rest(range(4, 5), range(4, 6))[1:] == [twice, [1009 * 1000 + index for index in usual[2]]]
    restored, _ = window_of(overprovision=0.0)
    restored.restore(str(tmp_path))  # after update 5, with what is in flight
    assert learn(restored, 5)[0] == [1009 * 1000 + index for index in usual[2]]
