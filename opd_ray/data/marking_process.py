"""Asks another process whether a response is right, and kills it when it takes too long."""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_MAX_CHARACTERS = 100_000  # of a response, from its end: where the answer is
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class MarkingProcess:
    """Asks one process, one question at a time, from whatever thread; starts it when it is first asked.

    module: serves `opd_ray.data.marking_child.serve` when it is run. A question that is not answered within
    deadline_s is answered with 0.0, and a new process takes its place.
    """

    def __init__(self, module: str, *, deadline_s: float = 5.0, start_s: float = 60.0) -> None:
        self._module, self._deadline_s, self._start_s = module, deadline_s, start_s
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def mark(self, response: str, answer: str) -> float:
        """Return 1.0 when the process says that the response is right, else 0.0; an empty one is not sent."""
        if not response.strip():
            return 0.0
        with self._lock:
            return float(self._ask(response[-_MAX_CHARACTERS:], answer) == "true")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, response: str, answer: str) -> str:
        """Return the process's word, nothing when there is none in time."""
        is_new = self._child is None or self._child.poll() is not None
        if is_new:
            self._end()
            self._child = self._start()
        assert self._child is not None
        deadline = time.monotonic() + self._deadline_s + (self._start_s if is_new else 0)
        try:
            text = self._exchange((json.dumps([response, answer]) + "\n").encode(), deadline)
        except BrokenPipeError:
            text = ""
        if not text:
            self._end()
        return text

    def _exchange(self, question: bytes, deadline: float) -> str:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(question)
        self._child.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return ""
        return self._child.stdout.readline().decode().strip()

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", self._module, str(self._deadline_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
        )

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdout.close()
        with suppress(BrokenPipeError):  # what it did not read
            self._child.stdin.close()
        self._child = None
