"""A real vLLM server process on this machine's loopback.

It is started by the module that `vllm serve` runs: the command itself asks for metadata that the CPU build lacks.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.config.teacher import HttpTeacherConfig

KEY_VARIABLE, KEY = "TEST_TEACHER_KEY", "correct"
_START_TIMEOUT_S = 240.0
_SERVER_ENV = {
    "VLLM_API_KEY": KEY,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # a server's engine has a process of its own
}


@dataclass(frozen=True, kw_only=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it at once, with its engine."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def config(self, **more: Any) -> HttpTeacherConfig:
        base: dict[str, Any] = {"urls": [self.url], "api_key_env": KEY_VARIABLE, "start_timeout_s": _START_TIMEOUT_S}
        return HttpTeacherConfig(**(base | more))


@contextmanager
def vllm_serve(folder: str, *, log_file: Path, port: int | None = None) -> Iterator[Server]:
    """Start a server, on a free port if none is given, in a process group of its own; end the group on leaving."""
    port = port or _free_port()
    flags = (
        f"--host 127.0.0.1 --port {port} --dtype float32 --max-model-len 64 --enforce-eager --served-model-name tiny"
    )
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", folder, *flags.split()],
            env=os.environ | _SERVER_ENV,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(process=process, port=port)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
