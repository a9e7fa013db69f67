"""A Ray head node of a test's own: ports and files apart from any other's, token authentication on."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
_PORT_OPTIONS = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNode:
    """Where the head listens, and the environment of a client that may use it."""

    dashboard: str
    address: str
    env: dict[str, str]
    sessions: Path  # Ray's folder

    def run(self, *command: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment as that client."""
        return subprocess.run(
            command,
            cwd=PROJECT,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command and leave it running."""
        return subprocess.Popen(command, cwd=PROJECT, env=self.env, stdout=log.open("wb"), stderr=subprocess.STDOUT)


@contextmanager
def head_node(folder: Path, *, num_cpus: int, store_bytes: int | None = None) -> Iterator[HeadNode]:
    """Start a head and end it and all that runs on it. folder: of its output, and the home of its clients.

    store_bytes: of its object store; None: Ray's own choice.
    """
    sessions = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets lie in it
    ports = _free_ports(len(_PORT_OPTIONS))
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = [f"{option}={port}" for option, port in zip(_PORT_OPTIONS, ports, strict=True)]
    options += [f"--object-store-memory={store_bytes}"] if store_bytes else []
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
         f"--temp-dir={sessions}", f"--num-cpus={num_cpus}", *options],
        env=env, stdout=(folder / "head.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    node = HeadNode(
        dashboard=f"http://127.0.0.1:{ports[1]}",
        address=f"127.0.0.1:{ports[0]}",
        env={**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"},
        sessions=sessions,
    )
    try:
        _wait_for(node, head)
        yield node
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(sessions, ignore_errors=True)


def _wait_for(node: HeadNode, head: subprocess.Popen[bytes]) -> None:
    for _ in range(30):
        assert head.poll() is None, "the head node ended"
        if node.run("ray", "job", "list").returncode == 0:
            return
    raise AssertionError("the head node did not come up")


def _free_ports(num_ports: int) -> list[int]:
    probes = [socket.socket() for _ in range(num_ports)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
