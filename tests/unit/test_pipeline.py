import pytest

from opd_ray.pipeline import Span, SplitWatch, Timeline, Window, bottleneck, busy_s, merged


def span(lane: str, start: float, end: float, phase: str = "generate") -> Span:
    return Span(lane=lane, phase=phase, start=start, end=end)


def used(rollout: float, teacher: float, learner: float) -> dict[str, float]:
    return {
        "perf/rollout_utilisation": rollout,
        "perf/teacher_utilisation": teacher,
        "perf/learner_utilisation": learner,
    }


@pytest.mark.parametrize(
    ("intervals", "union"),
    [
        ([], []),
        ([(2, 3), (0, 1)], [(0, 1), (2, 3)]),
        ([(0, 2), (1, 3), (3, 4)], [(0, 4)]),
        ([(0, 9), (1, 2)], [(0, 9)]),
        ([(1, 1), (3, 2)], []),
    ],
    ids=["none", "apart", "overlapping and touching", "one in the other", "empty and backwards"],
)
def test_the_union_of_intervals(intervals: list[tuple[float, float]], union: list[tuple[float, float]]):
    assert merged(intervals) == union


def test_a_lane_is_busy_inside_the_window_only_and_never_twice_at_once():
    spans = [span("rollout-0", -5, 2), span("rollout-0", 1, 3), span("rollout-0", 9, 12)]
    assert busy_s(spans, start=0, end=10) == 3 + 1


def test_utilisation_is_the_mean_over_all_workers_of_a_pool_idle_ones_too():
    timeline = Timeline(num_workers={"rollout": 2, "teacher": 4, "learner": 1}, lag=0)
    spans = [
        span("rollout-0", 0, 6),
        span("rollout-1", 0, 10),
        span("teacher-0", 2, 6, "score"),
        span("teacher-sort-1", 2, 6, "score"),
        span("learner", 6, 8, "learn"),
        span("learner", 8, 9, "publish"),
    ]
    window = timeline.add(1, start=0, end=10, spans=spans)
    assert window is not None
    assert timeline.metrics(window) == pytest.approx({**used(0.8, 0.2, 0.3), "time/generate_s": 8, "time/score_s": 2})


def test_with_a_batch_ahead_a_window_is_complete_when_the_batch_that_was_worked_on_in_it_is_learned_from():
    timeline = Timeline(num_workers={"rollout": 1}, lag=1)
    assert timeline.add(1, start=0, end=4, spans=[span("rollout-0", 0, 1)]) is None
    window = timeline.add(2, start=4, end=8, spans=[span("rollout-0", 1, 6)])
    assert window == Window(step=1, start=0, end=4, spans=[span("rollout-0", 0, 4)])
    assert timeline.metrics(window)["perf/rollout_utilisation"] == 1
    window = timeline.add(3, start=8, end=9, spans=[])
    assert window is not None
    assert (window.step, list(window.spans)) == (2, [span("rollout-0", 4, 6)])


def test_nothing_is_kept_of_work_in_windows_that_are_over():
    timeline = Timeline(num_workers={"rollout": 1}, lag=1)
    for step in range(50):
        timeline.add(step, start=step, end=step + 1, spans=[span("rollout-0", step, step + 0.5)])
    assert len(timeline._spans) <= 2
    assert len(timeline._open) == 1


def test_a_pool_that_shows_no_work_is_left_out():
    timeline = Timeline(num_workers={"rollout": 1, "teacher": 1}, lag=0)
    window = timeline.add(1, start=0, end=1, spans=[span("learner", 0, 1, "learn")])
    assert window is not None
    assert timeline.metrics(window) == {"perf/learner_utilisation": 1}


def test_a_pool_that_has_worked_before_was_idle_in_a_window_without_work():
    timeline = Timeline(num_workers={"rollout": 1, "teacher": 2}, lag=0)
    timeline.add(1, start=0, end=1, spans=[span("teacher-1", 0, 1, "score")])
    window = timeline.add(2, start=1, end=2, spans=[span("learner", 1, 2, "learn")])
    assert window is not None
    assert timeline.metrics(window) == {
        "perf/teacher_utilisation": 0,
        "time/score_s": 0,
        "perf/learner_utilisation": 1,
    }


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (used(0.9, 0.5, 0.2), "rollout-bound"),
        (used(0.5, 0.75, 0.2), "teacher-bound"),
        (used(0.5, 0.4, 0.2), "pools in turn"),
        ({"perf/rollout_utilisation": 1.0}, ""),
    ],
)
def test_the_bottleneck_in_words(metrics: dict[str, float], words: str):
    assert bottleneck(metrics) == words


def watch(*, gpus: bool = True, max_staleness: int = 1, colocated: bool = False, teachers: int = 3) -> SplitWatch:
    sizes = {"rollout": 4, "teacher": teachers, "learner": 2}
    return SplitWatch(sizes=sizes, gpus=gpus, max_staleness=max_staleness, colocated=colocated)


def hints(of: SplitWatch, metrics: dict[str, float], steps: int = 30) -> list[str]:
    return [words for _ in range(steps) if (words := of.hint(metrics))]


def test_badly_split_pools_are_told_once_and_what_to_move():
    assert hints(watch(), used(0.97, 0.3, 0.6)) == [
        "teacher is idle 70% of the time, rollout 3%: move one GPU to rollout (teacher.num_workers=2"
        " rollout.num_workers=5)"
    ]


def test_a_pool_of_one_has_none_to_give():
    (words,) = hints(watch(teachers=1), used(0.97, 0.3, 0.6))
    assert words.endswith("raise rollout.num_workers above 4")


def test_pools_that_wait_for_one_another_are_told_to_overlap():
    assert hints(watch(max_staleness=0), used(0.4, 0.3, 0.3)) == [
        "every pool is idle 60% of the time or more: max_staleness=1 lets them overlap"
    ]
    assert hints(watch(max_staleness=1), used(0.4, 0.3, 0.3)) == []


@pytest.mark.parametrize(
    ("of", "metrics", "steps"),
    [
        (watch(), used(0.97, 0.5, 0.6), 30),
        (watch(), used(0.97, 0.3, 0.6), 9),
        (watch(colocated=True), used(0.97, 0.1, 0.1), 30),
    ],
    ids=["well split", "too early to say", "on one GPU they take turns"],
)
def test_no_hint(of: SplitWatch, metrics: dict[str, float], steps: int):
    assert hints(of, metrics, steps) == []
