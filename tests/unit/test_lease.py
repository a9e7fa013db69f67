import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_ray.lease import lease
from opd_ray.state import RunDir

_HOLD = """
import sys, time
from pathlib import Path
from opd_ray.lease import lease
from opd_ray.state import RunDir
with lease(RunDir(path=Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def lease_file(run_dir: RunDir) -> Path:
    return run_dir.path.parent / f".{run_dir.path.name}.lease"


def test_a_second_controller_is_told_who_is_there_and_takes_over_when_that_one_is_killed(tmp_path: Path):
    run_dir = RunDir(path=tmp_path / "runs" / "demo")
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(run_dir.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=rf"demo is in use: process {holder.pid} on \S+ is training there"),
        lease(run_dir),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lease(run_dir):
        assert json.loads(lease_file(run_dir).read_text())["pid"] == os.getpid()


def test_nothing_is_left_of_a_lease_and_the_run_dir_itself_is_not_touched(tmp_path: Path):
    run_dir = RunDir(path=tmp_path / "runs" / "demo")
    for _ in range(2):
        with lease(run_dir), lease(RunDir(path=tmp_path / "runs" / "other")):
            assert not run_dir.path.exists()
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("age_s", "refused"), [(10, True), (1000, False)])
def test_a_controller_on_another_host_is_believed_while_its_beat_is_fresh(tmp_path: Path, age_s: float, refused: bool):
    run_dir = RunDir(path=tmp_path / "demo")
    beat = {"host": "elsewhere", "pid": 7, "beat": time.time() - age_s}
    lease_file(run_dir).write_text(json.dumps(beat))
    if refused:
        with pytest.raises(ValueError, match="process 7 on elsewhere is training there"), lease(run_dir):
            pass
        assert json.loads(lease_file(run_dir).read_text()) == beat
    else:
        with lease(run_dir):
            assert json.loads(lease_file(run_dir).read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("left", ["", "{", "[]", '{"host": "elsewhere"}', '{"host": 1, "pid": "x", "beat": 0}'])
def test_a_lease_file_that_says_nothing_holds_nothing(tmp_path: Path, left: str):
    run_dir = RunDir(path=tmp_path / "demo")
    lease_file(run_dir).write_text(left)
    with lease(run_dir):
        assert json.loads(lease_file(run_dir).read_text())["pid"] == os.getpid()


def test_a_runs_dir_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot be written .*: choose another runs_dir"),
        lease(RunDir(path=tmp_path / "file" / "demo")),
    ):
        pass
