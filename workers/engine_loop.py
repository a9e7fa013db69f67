"""Drives a vLLM engine from one thread: requests join as they come, finished ones leave at once.

Used by the rollout and the teacher workers. Everything that touches the engine runs on the loop's thread, between two
engine steps, so that weights never change inside a step.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
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
    done: "Future[Any]"


def executor(engine_args: Mapping[str, Any]) -> str:
    """Return how vLLM runs a model: in this process, or cut over several as tensor and pipeline parallelism ask."""
    num_processes = engine_args.get("tensor_parallel_size", 1) * engine_args.get("pipeline_parallel_size", 1)
    return "uni" if num_processes == 1 else "mp"


class EngineLoop:
    """Owns a `vllm.v1.engine.llm_engine.LLMEngine` and the thread that steps it.

    cache_salt: set from inside a `call`; requests admitted from then on share cached prefixes with one another only.
    request_options: what else the engine is told of each request; set in the same way.
    """

    def __init__(self, engine: Any) -> None:
        self.cache_salt: str | None = None
        self.request_options: dict[str, Any] = {}
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Request | _Call | None] = queue.SimpleQueue()
        self._running: dict[str, Future[Any]] = {}
        self._num_requests = 0
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def submit(self, token_ids: npt.NDArray[np.int32], params: Any, *, cache_salt: str | None = None) -> "Future[Any]":
        """Queue one sequence; the future resolves to vLLM's finished output.

        cache_salt: share cached prefixes only with requests of the same salt; None: with those of the loop's.
        """
        done: Future[Any] = Future()
        self._put(_Request(token_ids=token_ids.tolist(), params=params, cache_salt=cache_salt, done=done))
        return done

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Run a function on the loop's thread between two engine steps; the future resolves to its result."""
        done: Future[Any] = Future()
        self._put(_Call(function=function, done=done))
        return done

    def stop(self) -> None:
        """End the thread; what is still running, and what comes later, fails."""
        self._inbox.put(None)
        self._thread.join()

    def _put(self, item: _Request | _Call) -> None:
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
        """Take what has arrived, waiting if nothing runs; false when asked to stop."""
        while not (self._inbox.empty() and self._running):
            item = self._inbox.get()
            if item is None:
                return False
            if isinstance(item, _Call):
                self._answer(item)
            else:
                self._admit(item)
        return True

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

    def _fail_all(self, fault: BaseException) -> None:
        self._fault = fault
        for done in self._running.values():
            done.set_exception(fault)
        self._refuse_waiting(fault)

    def _refuse_waiting(self, fault: BaseException) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                if item is not None and item.done.set_running_or_notify_cancel():
                    item.done.set_exception(fault)
