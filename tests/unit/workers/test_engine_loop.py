import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from workers.engine_loop import EngineLoop, executor

TIMEOUT_S = 10


@dataclass
class Output:
    request_id: str
    prompt: dict[str, Any]
    finished: bool


@dataclass
class FakeEngine:
    """Finishes a request after as many steps as its parameter says; holds still while its gate is closed."""

    gate: threading.Event = field(default_factory=threading.Event)
    in_step: threading.Event = field(default_factory=threading.Event)
    events: list[tuple[str, Any]] = field(default_factory=list)
    running: dict[str, tuple[dict[str, Any], int]] = field(default_factory=dict)
    fault: BaseException | None = None

    def add_request(self, request_id: str, prompt: dict[str, Any], params: int) -> None:
        if params < 0:
            raise ValueError("the prompt is too long")
        self.events.append(("add", prompt["prompt_token_ids"]))
        self.running[request_id] = (prompt, params)

    def step(self) -> list[Output]:
        self.in_step.set()
        assert self.gate.wait(TIMEOUT_S)
        if self.fault is not None:
            raise self.fault
        self.events.append(("step", len(self.running)))
        outputs = []
        for request_id, (prompt, left) in list(self.running.items()):
            outputs.append(Output(request_id, prompt, finished=left <= 1))
            self.running[request_id] = (prompt, left - 1)
            if left <= 1:
                del self.running[request_id]
        return outputs


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def answer(future: "Future[Any]") -> Any:
    return future.result(timeout=TIMEOUT_S)


@contextmanager
def loop_on(engine: FakeEngine, *, is_open: bool = True, max_running: int = 99) -> Iterator[EngineLoop]:
    if is_open:
        engine.gate.set()
    loop = EngineLoop(engine, max_running=max_running)
    yield loop
    engine.gate.set()
    loop.stop()


def test_each_request_resolves_to_its_own_finished_output():
    with loop_on(FakeEngine()) as loop:
        futures = [loop.submit(ids(n, n + 1), num_steps) for n, num_steps in enumerate((3, 1, 2))]
        for n, future in enumerate(futures):
            output = answer(future)
            assert output.finished
            assert output.prompt["prompt_token_ids"] == [n, n + 1]


def test_token_ids_reach_the_engine_as_plain_integers():
    engine = FakeEngine()
    with loop_on(engine) as loop:
        answer(loop.submit(ids(7), 1))
    ((_, (token,)), *_) = engine.events
    assert type(token) is int


def test_a_short_request_leaves_while_a_long_one_runs_on():
    engine = FakeEngine()
    with loop_on(engine) as loop:
        long = loop.submit(ids(1), 10**9)
        answer(loop.submit(ids(2), 1))
        assert not long.done()


def test_a_request_joins_those_that_run_already():
    engine = FakeEngine()
    with loop_on(engine, is_open=False) as loop:
        first = loop.submit(ids(1), 2)
        assert engine.in_step.wait(TIMEOUT_S)
        second = loop.submit(ids(2), 1)
        engine.gate.set()
        answer(first)
        answer(second)
    assert ("step", 2) in engine.events


def test_sequences_submitted_together_start_together():
    engine = FakeEngine()
    with loop_on(engine) as loop:
        for future in loop.submit_together([(ids(n), 2) for n in range(50)]):
            answer(future)
    assert [event for event in engine.events if event[0] == "step"] == [("step", 50)] * 2


def test_no_more_than_the_limit_run_and_the_others_follow_in_order():
    engine = FakeEngine()
    with loop_on(engine, max_running=2) as loop:
        for future in loop.submit_together([(ids(n), n + 1) for n in range(4)]):
            answer(future)
    assert max(event[1] for event in engine.events if event[0] == "step") == 2
    assert [event[1] for event in engine.events if event[0] == "add"] == [[0], [1], [2], [3]]


def test_a_drained_call_waits_for_what_runs_and_starts_nothing_meanwhile():
    engine = FakeEngine()
    with loop_on(engine, is_open=False, max_running=2) as loop:
        running = loop.submit_together([(ids(1), 3), (ids(2), 1)])
        assert engine.in_step.wait(TIMEOUT_S)
        call = loop.call(lambda: engine.events.append(("call", None)), drained=True)
        later = loop.submit(ids(3), 1)
        engine.gate.set()
        for future in (*running, call, later):
            answer(future)
    first = [("add", [1]), ("add", [2]), ("step", 2), ("step", 1), ("step", 1)]
    assert engine.events == [*first, ("call", None), ("add", [3]), ("step", 1)]


def test_a_drained_call_runs_at_once_where_nothing_runs_and_before_what_comes_later():
    engine = FakeEngine()
    with loop_on(engine) as loop:
        answer(loop.call(lambda: engine.events.append(("call", None)), drained=True))
        answer(loop.submit(ids(1), 1))
    assert [event[0] for event in engine.events] == ["call", "add", "step"]


def test_what_waits_for_a_drain_fails_with_the_engine():
    engine = FakeEngine()
    with loop_on(engine, is_open=False) as loop:
        running = loop.submit(ids(1), 5)
        assert engine.in_step.wait(TIMEOUT_S)
        held = [loop.call(lambda: None, drained=True), loop.submit(ids(2), 1)]
        engine.fault = RuntimeError("out of memory")
        engine.gate.set()
        for future in (running, *held):
            with pytest.raises(RuntimeError, match="out of memory"):
                answer(future)


def test_calls_run_between_two_steps_on_the_loops_own_thread_in_order():
    engine = FakeEngine()
    with loop_on(engine, is_open=False) as loop:
        running = loop.submit(ids(1), 2)
        assert engine.in_step.wait(TIMEOUT_S)
        threads: list[int] = []

        def note(name: str) -> str:
            threads.append(threading.get_ident())
            engine.events.append(("call", name))
            return name

        calls = [loop.call(lambda name=name: note(name)) for name in ("a", "b")]
        assert not any(call.done() for call in calls)
        engine.gate.set()
        assert [answer(call) for call in calls] == ["a", "b"]
        answer(running)
        assert engine.events[-1][0] == "step"
        assert [name for kind, name in engine.events if kind == "call"] == ["a", "b"]
        assert set(threads) != {threading.get_ident()}
        assert len(set(threads)) == 1


def test_a_call_is_answered_while_nothing_runs():
    engine = FakeEngine()
    with loop_on(engine, is_open=False) as loop:
        assert answer(loop.call(lambda: 42)) == 42
    assert engine.events == []


def test_a_call_that_fails_fails_only_its_own_future():
    def fail() -> None:
        raise RuntimeError("bad weights")

    with loop_on(FakeEngine()) as loop:
        with pytest.raises(RuntimeError, match="bad weights"):
            answer(loop.call(fail))
        assert answer(loop.submit(ids(1), 1)).finished


def test_a_refused_request_fails_only_its_own_future():
    with loop_on(FakeEngine()) as loop:
        running = loop.submit(ids(1), 3)
        with pytest.raises(ValueError, match="too long"):
            answer(loop.submit(ids(2), -1))
        assert answer(running).finished
        assert answer(loop.submit(ids(3), 1)).finished


def test_requests_share_cached_prefixes_only_under_the_salt_that_a_call_has_set():
    with loop_on(FakeEngine()) as loop:
        assert "cache_salt" not in answer(loop.submit(ids(1), 1)).prompt

        def load_weights() -> None:
            loop.cache_salt = "7"

        answer(loop.call(load_weights))
        assert answer(loop.submit(ids(1), 1)).prompt["cache_salt"] == "7"


def test_a_request_may_have_a_salt_of_its_own():
    with loop_on(FakeEngine()) as loop:
        loop.cache_salt = "7"
        assert answer(loop.submit(ids(1), 1, cache_salt="8")).prompt["cache_salt"] == "8"
        assert answer(loop.submit(ids(1), 1)).prompt["cache_salt"] == "7"


def test_a_fault_of_the_engine_reaches_every_waiter_and_every_later_request():
    engine = FakeEngine()
    with loop_on(engine, is_open=False) as loop:
        running = loop.submit(ids(0), 5)
        assert engine.in_step.wait(TIMEOUT_S)
        in_the_inbox = [loop.submit(ids(1), 5), loop.call(lambda: None)]
        engine.fault = MemoryError("out of memory")
        engine.gate.set()
        for waiter in (running, *in_the_inbox):
            with pytest.raises(MemoryError, match="out of memory"):
                answer(waiter)
        loop._thread.join(TIMEOUT_S)
        for latecomer in (loop.submit(ids(9), 1), loop.call(lambda: None)):
            with pytest.raises(MemoryError, match="out of memory"):
                answer(latecomer)


def test_a_caller_that_gives_up_does_not_stop_the_engine_for_the_others():
    engine = FakeEngine()
    with loop_on(engine, is_open=False) as loop:
        given_up, other = loop.submit(ids(1), 1), loop.submit(ids(2), 2)
        assert engine.in_step.wait(TIMEOUT_S)
        given_up.cancel()
        engine.gate.set()
        assert answer(other).finished


def test_a_stop_ends_the_thread_and_fails_what_still_runs_and_what_comes_later():
    engine = FakeEngine()
    engine.gate.set()
    loop = EngineLoop(engine)
    running = loop.submit(ids(1), 10**9)
    answer(loop.call(lambda: None))
    loop.stop()
    assert not loop._thread.is_alive()
    for future in (running, loop.submit(ids(2), 1), loop.call(lambda: None)):
        with pytest.raises(RuntimeError, match="stopped"):
            answer(future)


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        ({}, "uni"),
        ({"tensor_parallel_size": 1, "enforce_eager": True}, "uni"),
        ({"tensor_parallel_size": 2}, "mp"),
        ({"pipeline_parallel_size": 2}, "mp"),
    ],
)
def test_a_model_cut_over_processes_needs_an_executor_that_starts_them(engine_args: dict[str, object], expected: str):
    assert executor(engine_args) == expected


def test_a_held_loop_takes_calls_and_requests_but_no_step_until_it_is_let_go():
    engine = FakeEngine()
    with loop_on(engine) as loop:

        def hold(held: bool) -> None:
            loop.held = held

        answer(loop.call(lambda: hold(True)))
        waiting = loop.submit(ids(1), 1)
        answer(loop.call(lambda: None))
        assert engine.events == [("add", [1])]
        assert not waiting.done()
        answer(loop.call(lambda: hold(False)))
        assert answer(waiting).finished
