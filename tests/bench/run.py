"""The benchmark: `python tests/bench/run.py [PART...]` measures the named parts, or all, into runs/bench/bench.json."""

import sys
from collections.abc import Callable, Iterator

from controller import controller
from end_to_end import end_to_end
from harness import Figure, record
from loss import loss
from loss_gpu import loss_gpu
from object_store import object_store
from packing import packing
from pipeline import pipeline
from reliability import reliability
from sync import sync
from teacher import teacher
from teacher_gpu import teacher_gpu

PARTS: dict[str, Callable[[], Iterator[Figure]]] = {
    "controller": controller,
    "end_to_end": end_to_end,
    "loss": loss,
    "loss_gpu": loss_gpu,
    "object_store": object_store,
    "packing": packing,
    "pipeline": pipeline,
    "reliability": reliability,
    "sync": sync,
    "teacher": teacher,
    "teacher_gpu": teacher_gpu,
}


def main(names: list[str]) -> int:
    """Print and record each figure as it is measured; return 0, 1 for a missed target, 2 for a typo."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"error: PART={unknown[0]}: expected one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    missed = []
    for name in names or PARTS:
        for figure in PARTS[name]():
            print(figure, flush=True)
            record([figure])
            if not figure.holds:
                missed.append(figure)
    for figure in missed:
        print(f"missed: {figure}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
