"""A run that is told to end is left where no update is lost: at once there, later elsewhere."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeEvaluator, FakeLearner, FakeScreen, FakeTracker, fake_fleets, fake_window

from opd_ray.assembly import run_saved
from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.controller import Loop
from opd_ray.protocol import Batch, Metrics
from opd_ray.schedule import Schedule
from opd_ray.stopping import Stopped, StopSignal


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def listen(script: Callable[[StopSignal], None]) -> None:
    with StopSignal().listening() as stop:
        script(stop)


def past_the_first_batch(stop: StopSignal) -> None:
    with stop.stoppable():
        pass


def test_before_the_first_batch_it_ends_at_once() -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
        listen(lambda _: tell())
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_while_a_batch_is_waited_for_it_ends_at_once() -> None:
    def script(stop: StopSignal) -> None:
        past_the_first_batch(stop)
        with stop.stoppable():
            tell()
            raise AssertionError("went on")

    with pytest.raises(Stopped):
        listen(script)


def test_elsewhere_it_ends_when_the_next_batch_is_waited_for() -> None:
    reached = []

    def script(stop: StopSignal) -> None:
        past_the_first_batch(stop)
        tell()
        reached.append("the update's end")
        with stop.stoppable():
            reached.append("the next batch")

    with pytest.raises(Stopped):
        listen(script)
    assert reached == ["the update's end"]


def test_the_first_control_c_is_as_a_stop_and_the_second_is_not_held_up() -> None:
    def script(stop: StopSignal) -> None:
        past_the_first_batch(stop)
        tell(signal.SIGINT)
        tell(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        listen(script)


def test_the_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal().listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_than_the_main_one_listens_to_nothing() -> None:
    before, during = signal.getsignal(signal.SIGTERM), []

    def script(_: StopSignal) -> None:
        during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen, args=(script,))
    thread.start()
    thread.join()
    assert during == [before]


@pytest.mark.parametrize("first_batch", [True, False])
def test_what_ray_makes_of_it_while_it_waits_is_told_as_a_stop(first_batch: bool) -> None:
    def waits() -> None:
        try:
            tell()
        except Stopped as stopped:
            raise SystemError("returned a result with an exception set") from stopped

    def script(stop: StopSignal) -> None:
        if first_batch:
            waits()
        with stop.stoppable():
            waits()

    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        listen(script)


def test_a_system_error_without_a_signal_stays_one() -> None:
    def script(stop: StopSignal) -> None:
        with stop.stoppable():
            raise SystemError("another")

    with pytest.raises(SystemError, match="another"):
        listen(script)


class ToldDuring(FakeLearner):
    """Is interrupted in its second update."""

    def update(self, batch: Batch) -> Metrics:
        if batch.step == 1:
            tell()
        return super().update(batch)


def test_an_update_that_has_begun_is_finished_published_logged_and_saved(tmp_path: Path) -> None:
    calls: list = []
    fleets = replace(fake_fleets(calls), learner=ToldDuring(calls))
    checkpoints = DiskCheckpoints(folder=tmp_path)

    def script(stop: StopSignal) -> None:
        loop = Loop(
            schedule=Schedule(num_steps=4, max_staleness=0, eval_every=0, save_every=0),
            fleets=fleets,
            window=fake_window(fleets, num_steps=4),
            screen=FakeScreen(calls),
            evaluator=FakeEvaluator(calls),
            checkpoints=checkpoints,
            tracker=FakeTracker(calls),
            stoppable=stop.stoppable,
        )
        run_saved(loop, step=0, checkpoints=checkpoints)

    with pytest.raises(Stopped) as caught:
        listen(script)
    assert str(caught.value).startswith("stopped by SIGTERM; the checkpoint")
    assert str(caught.value).endswith("is written, resume=auto goes on from update 2")
    assert (tmp_path / "step-000002" / "MANIFEST.json").exists()
