"""Measure bias and variance of sequence-level, token-level and discounted gradients of the reverse KL.

The question of arXiv 2603.25562, asked of this project's `sampled` objective: on tabular students, exactly
(`variance_tabular`), and while a small policy trains (`variance_control`). Writes variance.json and variance.png.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from opd_ray.studies.variance_report import draw, tables
from opd_ray.studies.variance_study import default_settings, quick_settings, run_study

_SEEDS = 2**32
_USER_ERROR = 2


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m opd_ray.studies.variance", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/variance"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="first seed, 0 or more")
    parser.add_argument("--quick", action="store_true", help="a few seconds, rough numbers")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < _SEEDS:
        _fail(f"--seed {arguments.seed}: expected 0 or more and below {_SEEDS}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "variance.json").touch()  # now rather than after the measurement
    except OSError as error:
        _fail(f"--out {arguments.out}: {error.strerror}")
    torch.set_num_threads(1)  # the tensors are small
    results = run_study((quick_settings if arguments.quick else default_settings)(arguments.seed))
    (arguments.out / "variance.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    draw(results, arguments.out / "variance.png")
    console = Console()
    for table in tables(results):
        console.print(table)
    console.print(f"{results.seconds:.0f} s; wrote variance.json and variance.png to {arguments.out}", highlight=False)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(_USER_ERROR)


if __name__ == "__main__":
    main()
