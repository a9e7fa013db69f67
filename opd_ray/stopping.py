"""Ends a run that is told to end: SIGTERM, as `ray job stop`, Kubernetes and Slurm send it, or Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opd_ray.protocol import CannotGoOn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(CannotGoOn):
    """The run was told to end."""

    def __init__(self, words: str, *, number: int) -> None:
        super().__init__(words)
        self.exit_code = 128 + number  # as shells count a process that a signal ended


class StopSignal:
    """Raises `Stopped` in the main thread where the run may be left, at once or as soon as it gets there.

    Until the first `stoppable` block that is everywhere; from then on within such blocks only. The second signal is
    not held up.
    """

    def __init__(self) -> None:
        self._asked: Stopped | None = None
        self._may_stop = True

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Take the signals over and give them back on leaving; only a process's main thread can.

        Ray takes SIGTERM for itself when it connects: listen after that.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            with self._as_asked():
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within, the run may be left without losing an update."""
        self._may_stop = True
        try:
            if self._asked:
                raise self._asked
            with self._as_asked():
                yield
        finally:
            self._may_stop = False

    @contextmanager
    def _as_asked(self) -> Iterator[None]:
        """Tell `Stopped` for the SystemError that Ray makes of it when it is raised while Ray waits."""
        try:
            yield
        except SystemError:
            if self._asked is None:
                raise
            raise self._asked from None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        self._asked = Stopped(f"stopped by {signal.Signals(number).name}", number=number)
        if self._may_stop:
            raise self._asked
