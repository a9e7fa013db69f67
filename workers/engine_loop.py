"""Drives a vLLM engine from one thread: requests join as they come, finished ones leave at once.

Used by the rollout and the teacher workers. Everything that touches the engine runs on the loop's thread, between two
engine steps, so that weights never change inside a step.
"""

import contextlib
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    token_ids: list[int]
    params: Any  # vllm.SamplingParams | vllm.PoolingParams
    cache_salt: str | None
    done: "Future[Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    function: Callable[[], Any]
    drained: bool  # only while no sequence runs
    done: "Future[Any]"


def executor(engine_args: Mapping[str, Any]) -> str:
    """Return how vLLM runs a model: in this process, or cut over several as tensor and pipeline parallelism ask."""
    num_processes = engine_args.get("tensor_parallel_size", 1) * engine_args.get("pipeline_parallel_size", 1)
    return "uni" if num_processes == 1 else "mp"


class EngineLoop:
    """Owns a `vllm.v1.engine.llm_engine.LLMEngine` and the thread that steps it.

    max_running: sequences that the engine has at a time; the others wait here, in order, untouched by any weights.
    cache_salt: set from inside a `call`; requests admitted from then on share cached prefixes with one another only.
    request_options: what else the engine is told of each request; set in the same way.
    held: set from inside a `call`; while true no step is taken, what runs and what comes waits.
    """

    def __init__(self, engine: Any, *, max_running: int = sys.maxsize) -> None:
        self.cache_salt: str | None = None
        self.request_options: dict[str, Any] = {}
        self.held = False
        self._engine = engine
        self._max_running = max_running
        self._inbox: queue.SimpleQueue[list[_Request] | _Call | None] = queue.SimpleQueue()
        self._waiting = deque[_Request]()
        self._draining = deque[_Call]()  # calls that wait for the last running sequence: until then none is admitted
        self._running: dict[str, Future[Any]] = {}
        self._num_requests = 0
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def submit(self, token_ids: npt.NDArray[np.int32], params: Any, *, cache_salt: str | None = None) -> "Future[Any]":
        """Queue one sequence; the future resolves to vLLM's finished output.

        cache_salt: share cached prefixes only with requests of the same salt; None: with those of the loop's.
        """
        return self.submit_together([(token_ids, params)], cache_salt=cache_salt)[0]

    def submit_together(
        self, sequences: Sequence[tuple[npt.NDArray[np.int32], Any]], *, cache_salt: str | None = None
    ) -> "list[Future[Any]]":
        """Queue sequences, pairs of token ids and parameters, of which none starts a step before the others."""
        requests = [
            _Request(token_ids=token_ids.tolist(), params=params, cache_salt=cache_salt, done=Future())
            for token_ids, params in sequences
        ]
        self._put(requests)
        return [request.done for request in requests]

    def call(self, function: Callable[[], Any], *, drained: bool = False) -> "Future[Any]":
        """Run a function on the loop's thread between two engine steps; the future resolves to its result.

        drained: first let all running sequences finish, and start no other meanwhile.
        """
        done: Future[Any] = Future()
        self._put(_Call(function=function, drained=drained, done=done))
        return done

    def stop(self) -> None:
        """End the thread; what is still running, and what comes later, fails."""
        self._inbox.put(None)
        self._thread.join()

    def _put(self, item: list[_Request] | _Call) -> None:
        self._inbox.put(item)
        if self._fault is not None:  # looked at after the put: one of the two, the thread or we, sees the other
            self._refuse_waiting(self._fault)

    def _run(self) -> None:
        try:
            while self._drain_inbox():
                self._step()
            self._fail_all(RuntimeError("the engine loop was stopped"))
        except BaseException as fault:  # noqa: BLE001 - the thread's edge: every waiter learns of it
            self._fail_all(fault)

    def _drain_inbox(self) -> bool:
        """Take what has arrived, waiting if nothing runs or may run; false when asked to stop."""
        while self.held or not (self._inbox.empty() and self._running):
            item = self._inbox.get()
            if item is None:
                return False
            if isinstance(item, list):
                self._waiting += item
            elif item.drained and self._running and not self.held:  # held: what runs cannot finish
                self._draining.append(item)
            else:
                self._answer(item)
            self._admit_waiting()
        return True

    def _admit_waiting(self) -> None:
        while self._waiting and not self._draining and len(self._running) < self._max_running:
            self._admit(self._waiting.popleft())

    def _answer(self, item: _Call) -> None:
        if not item.done.set_running_or_notify_cancel():
            return
        try:
            item.done.set_result(item.function())
        except Exception as error:  # noqa: BLE001 - handed to the caller, who waits on the future
            item.done.set_exception(error)

    def _admit(self, item: _Request) -> None:
        if not item.done.set_running_or_notify_cancel():  # from here on its caller cannot cancel it
            return
        prompt: dict[str, Any] = {"prompt_token_ids": item.token_ids}
        salt = self.cache_salt if item.cache_salt is None else item.cache_salt
        if salt is not None:
            prompt["cache_salt"] = salt
        self._num_requests += 1
        request_id = str(self._num_requests)
        try:
            self._engine.add_request(request_id, prompt, item.params, **self.request_options)
        except ValueError as error:  # vLLM refuses the request (too long, for one); the engine goes on
            item.done.set_exception(error)
            return
        self._running[request_id] = item.done

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._running.pop(output.request_id).set_result(output)
        while self._draining and not self._running:
            self._answer(self._draining.popleft())
        self._admit_waiting()

    def _fail_all(self, fault: BaseException) -> None:
        self._fault = fault
        for done in self._running.values():
            done.set_exception(fault)
        _refuse([*self._waiting, *self._draining], fault)
        self._refuse_waiting(fault)

    def _refuse_waiting(self, fault: BaseException) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                _refuse(item if isinstance(item, list) else [item] if item is not None else [], fault)


def _refuse(items: Sequence[_Request | _Call], fault: BaseException) -> None:
    for item in items:
        if item.done.set_running_or_notify_cancel():
            item.done.set_exception(fault)
