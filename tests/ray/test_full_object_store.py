"""The object store is full of what another driver reads: the run's own objects go to the disk, and it ends the same."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_runs import run_to_end
from head_node import HeadNode, head_node

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_LIMIT_S = 300
_STORE_BYTES = 80 << 20  # nearly Ray's least
# Reads what it has put, so that Ray cannot move that to the disk; on a line of its input it tells how many bytes of all
# drivers lie on the disk, or did, instead of in the store.
_HOG = """
import sys
import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
ray.init("auto", log_to_driver=False)
held = [ray.get(ray.put(np.ones(1 << 19, dtype=np.uint8))) for _ in range(159)]
print("holds", flush=True)
for _ in sys.stdin:
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    print(stats.object_store_bytes_fallback + stats.spilled_bytes_total, flush=True)
"""


@contextmanager
def _full(head: HeadNode) -> Iterator[Callable[[], int]]:
    """Fill the store; yield what tells how many bytes are elsewhere."""
    hog = subprocess.Popen(
        ["python", "-c", _HOG],
        env={**head.env, "RAY_ADDRESS": head.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert hog.stdin
    assert hog.stdout

    def elsewhere() -> int:
        print(file=hog.stdin, flush=True)
        return int(hog.stdout.readline())

    try:
        while hog.stdout.readline() != "holds\n":
            assert hog.poll() is None
        yield elsewhere
    finally:
        hog.kill()
        hog.wait()


def test_a_run_in_a_full_object_store_ends_with_the_same_weights(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = overrides("num_steps=3", "deterministic=true", "eval_every=3")
    runs = tmp_path / "runs"
    whole = run_to_end([*arguments, "name=whole"], run_dir=runs / "whole", limit_s=_LIMIT_S)
    seen: list[int] = []
    with head_node(tmp_path, num_cpus=4, store_bytes=_STORE_BYTES) as head, _full(head) as elsewhere:
        env = {**head.env, "RAY_ADDRESS": head.address}
        before = elsewhere()
        full = run_to_end(
            [*arguments, "name=full"],
            run_dir=runs / "full",
            limit_s=_LIMIT_S,
            env=env,
            watch=lambda *_: seen.append(elsewhere()),
        )
    for outcome in (whole, full):
        assert outcome.exit_code == 0, outcome.output
        assert outcome.steps == list(range(4))
    assert max(seen) > before
    assert full.weights == whole.weights != ""
