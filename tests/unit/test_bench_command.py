"""`make bench` starts: every part's module is there and imports."""

import subprocess
import sys
from pathlib import Path


def test_an_unknown_part_is_told_with_those_that_there_are():
    script = Path(__file__).parents[1] / "bench" / "run.py"
    done = subprocess.run([sys.executable, str(script), "los"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip().startswith("error: PART=los: expected one of")) == (2, True)
