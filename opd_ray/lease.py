"""One controller to a run dir: a lease beside it, held while the process lives."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from opd_ray.state import RunDir

_BEAT_S = 5.0
_STALE_S = 60.0  # without a beat another host's controller is taken for dead


class _Holder(NamedTuple):
    host: str
    pid: int
    beat: float  # Unix seconds


@contextmanager
def lease(run_dir: RunDir) -> Iterator[None]:
    """Hold a run dir. Raises ValueError while another controller does, here or on another host.

    The kernel's lock ends with the process that holds it, however that ends; the beat serves file systems that do not
    carry locks from host to host.
    """
    path = run_dir.path.parent / f".{run_dir.path.name}.lease"
    with _taken(path, run_dir) as file:
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(file, done), daemon=True, name="lease")
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            path.unlink(missing_ok=True)


def _taken(path: Path, run_dir: RunDir) -> IO[str]:
    """Return the file, locked and telling who holds it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}): choose another runs_dir=...") from None
        try:
            _take(file, run_dir)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its last holder has removed it meanwhile


def _take(file: IO[str], run_dir: RunDir) -> None:
    file.seek(0)
    holder = _holder(file.read())
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(_refusal(run_dir, holder)) from None
    if holder and holder.host != socket.gethostname() and time.time() - holder.beat < _STALE_S:
        raise ValueError(_refusal(run_dir, holder))
    _write(file)


def _refusal(run_dir: RunDir, holder: _Holder | None) -> str:
    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
    return f"{run_dir.path} is in use: {who} is training there; wait for its end, stop it, or choose another name=..."


def _beat(file: IO[str], done: threading.Event) -> None:
    while not done.wait(_BEAT_S):
        try:
            _write(file)
        except OSError:  # a full disk ends no run here
            continue


def _write(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}, file)
    file.flush()


def _holder(text: str) -> _Holder | None:
    try:
        holder = json.loads(text)
        return _Holder(host=str(holder["host"]), pid=int(holder["pid"]), beat=float(holder["beat"]))
    except (ValueError, KeyError, TypeError):
        return None
