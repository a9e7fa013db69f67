"""No secret of a run is in what it prints, writes, sends or starts: canaries are looked for everywhere."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from head_node import PROJECT
from stub_teacher_server import StubServer, failed, serving

pytestmark = pytest.mark.ray

_KEYS = {
    "WANDB_API_KEY": "canary" + "0" * 34,
    "HF_TOKEN": "hf_canary_token",
    "TEST_TEACHER_KEY": "canary-of-the-teacher",
}
_NUM_ANSWERED = 1 + 4 + 4 * 2  # getting ready, the held-out prompts, and update 1
_LIMIT_S = 300.0


def _command_lines(pid: int) -> str:
    lines = []
    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


def test_a_run_that_fails_leaves_its_secrets_nowhere(
    overrides: Callable[..., list[str]], model_folder: Any, tmp_path: Path
) -> None:
    stub = StubServer(defect=lambda n: failed if n > _NUM_ANSWERED else None)
    sessions = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets lie in it
    log = tmp_path / "output"
    with serving(stub), log.open("w") as output:
        arguments = overrides(
            "teacher=http",
            f"teacher.path={model_folder(seed=1)}",
            f"teacher.http.urls=['{stub.url}']",
            "teacher.http.api_key_env=TEST_TEACHER_KEY",
            "teacher.http.max_attempts=2",
            "teacher.http.backoff_s=0.05",
            "objective=sampled",
            "eval.samples_per_prompt=1",
            "tracking=wandb",
        )
        run = subprocess.Popen(
            [sys.executable, "-m", "opd_ray.train", *arguments],
            cwd=PROJECT,
            env={**os.environ, **_KEYS, "WANDB_MODE": "offline", "RAY_TMPDIR": str(sessions)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        seen, until = "", time.monotonic() + _LIMIT_S
        while run.poll() is None and time.monotonic() < until:
            seen += _command_lines(run.pid)
            time.sleep(0.5)
        run.kill()
        run.wait()
    try:
        assert run.returncode == 1, log.read_text()
        assert "update 2: 4 groups could not be scored" in log.read_text()
        assert "ray::" in seen
        files = [path for root in (tmp_path, sessions) for path in root.rglob("*") if path.is_file()]
        for part in ("config.yaml", "events.jsonl", "wandb", "raylet.out"):
            assert any(part in str(path) for path in files), part
        for name, key in _KEYS.items():
            assert key not in seen, name
            assert [str(path) for path in files if key.encode() in path.read_bytes()] == [], name
    finally:
        shutil.rmtree(sessions, ignore_errors=True)
