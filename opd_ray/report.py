"""Writes one HTML page of each run that is named, and one that compares them where there are several.

python -m opd_ray.report runs/demo
python -m opd_ray.report runs/demo-0 runs/demo-1 runs/demo-2 --output comparison.html
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_ray.reporting.page import render
from opd_ray.reporting.reading import read_run
from opd_ray.reporting.side_by_side import render_comparison

_PAGE, _COMPARISON = "report.html", "comparison.html"
_USER_ERROR = 2


def pages(folders: Sequence[Path], *, output: Path | None = None) -> Mapping[Path, str]:
    """Return the text of each page and where it belongs: in the folder of its run; beside the first, that of several.

    output is where the page of one run, or the page that compares several, belongs instead. Raises ValueError, OSError
    before anything is written.
    """
    distinct = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    runs = [read_run(folder) for folder in distinct]
    if len(runs) == 1:
        return {output or distinct[0] / _PAGE: render(runs[0])}
    compared = {output or distinct[0].parent / _COMPARISON: render_comparison(runs)}
    return {folder / _PAGE: render(run) for folder, run in zip(distinct, runs, strict=True)} | compared


def write_report(folder: Path) -> Path:
    """Write the page of a run into its folder and return where it is. Raises ValueError, OSError."""
    return _write(pages([folder]))[0]


def _write(texts: Mapping[Path, str]) -> list[Path]:
    for path, text in texts.items():
        path.write_text(text)
    return list(texts)


def main() -> None:
    """Write the pages that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m opd_ray.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run dir, such as runs/demo")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes: of one run, or the one that compares several (comparison.html beside the first)",
    )
    options = parser.parse_args()
    try:
        print(*_write(pages(options.runs, output=options.output)), sep="\n")
    except (ValueError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        raise SystemExit(_USER_ERROR) from None


if __name__ == "__main__":
    main()
