"""What a part of the benchmark reports, and how one of its cells is run: figures, the file they go to, subprocesses."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import Cost

_ROOT = Path(__file__).resolve().parents[2]
BENCH_FILE = _ROOT / "runs" / "bench" / "bench.json"
# Where `make bench` installs what only the benchmark needs.
_EXTRA_PACKAGES = Path(sys.prefix) / "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of the benchmark, as it stands in bench.json."""

    part: str
    name: str
    value: float
    unit: str
    target: str = "no target"
    holds: bool = True  # vacuously, without a target

    def __str__(self) -> str:
        return f"{self.part}/{self.name} {self.value:.4g} {self.unit} ({self.target})"


def at_most(limit: float, *, part: str, name: str, value: float, unit: str) -> Figure:
    """Return a figure whose target is an upper limit, without one if that is infinite; NaN misses it."""
    if limit == math.inf:
        return Figure(part=part, name=name, value=value, unit=unit)
    return Figure(part=part, name=name, value=value, unit=unit, target=f"<= {limit:g}", holds=value <= limit)


def at_least(limit: float, *, part: str, name: str, value: float, unit: str) -> Figure:
    """Return a figure whose target is a lower limit; NaN misses it."""
    return Figure(part=part, name=name, value=value, unit=unit, target=f">= {limit:g}", holds=value >= limit)


def record(figures: Sequence[Figure], *, path: Path = BENCH_FILE) -> None:
    """Merge figures into the file: those of the same part and name are replaced, the others kept.

    The file is replaced in one step, so a reader or an interrupted run never sees half of it.
    """
    kept = {(row["part"], row["name"]): row for row in json.loads(path.read_text())} if path.exists() else {}
    merged = kept | {(figure.part, figure.name): asdict(figure) for figure in figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    draft.replace(path)


def run_cell(script: str, *arguments: str, extra_packages: bool = False) -> Cost:
    """Run a script of this folder in a fresh process and return the cost that it prints; see `run_script`."""
    return Cost(**run_script(script, *arguments, extra_packages=extra_packages))


def run_script(script: str, *arguments: str, extra_packages: bool = False) -> Any:
    """Run a script of this folder in a fresh process and return what it prints as its last line, JSON.

    extra_packages: put the packages that only the benchmark has on its path.
    Raises RuntimeError, with the end of what the script wrote, when it fails.
    """
    packages = [str(_ROOT)] + ([str(_EXTRA_PACKAGES)] if extra_packages else [])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages)}
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} exited with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
