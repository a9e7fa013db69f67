"""The cell of the scoring benchmark: all ways in one process, warm, in turns; prints its numbers as a line of JSON."""

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

# As in a worker (workers/fleet.py), for the peers' engine too; set before vLLM is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import numpy as np
from teacher_agreement import Reference, largest_difference, read_reference
from teacher_problem import make_group
from teacher_ways import OURS, TOP_K, OurTeacher, PeersTeacher, our_handling, peers_handling, seconds

from opd_ray.protocol import TrajectoryGroup
from workers.output_head import load_head

_ROUNDS = 7
_HANDLING_ROUNDS = 25  # each takes milliseconds
PEERS = {
    f"{form}_k{top_k}": {"top_k": top_k, "flat": form == "flat"}
    for form in ("default", "flat")
    for top_k in (20, TOP_K)
}


def main(folder: Path) -> None:
    """Measure every way on the same 16 sequences, then what the samples of one prompt gain from each other."""
    ours, peers = OurTeacher(folder), PeersTeacher(folder)
    group = make_group(num_samples=16, prompt_tokens=1, response_tokens=255)
    reference = read_reference(peers.score(group, top_k=TOP_K, flat=False), group, top_k=TOP_K)
    group = replace(group, support_ids=_shuffled(reference))
    num_tokens = len(group.response_ids)
    calls: dict[str, Callable[[], object]] = {name: partial(peers.score, group, **how) for name, how in PEERS.items()}
    calls |= {name: partial(ours.score, group, request) for name, request in OURS.items()}
    score_s = _in_turns(calls)  # before anything holds objects that would keep the garbage collector busy
    handling = {name: peers_handling(peers.score(group, **how)) for name, how in PEERS.items()}
    handling |= {name: our_handling(folder, group, request) for name, request in OURS.items()}
    # One after the other: in turns, the first of ours would pay for the caches that pickling theirs has emptied.
    handling_s = {name: _in_turns({name: call}, num_rounds=_HANDLING_ROUNDS)[name] for name, call in handling.items()}
    ways = {
        name: {
            "tokens_per_s": num_tokens / statistics.median(score_s[name]),
            "best_tokens_per_s": num_tokens / min(score_s[name]),
            "python_us": 1e6 * statistics.median(handling_s[name]) / num_tokens,
            "bytes": len(handling[name]()) / num_tokens,
        }
        for name in calls
    }
    result = {
        "ways": ways,
        "differences": _differences(ours, group, reference, folder=folder),
        "prefix_sharing_speedup": _prefix_sharing_speedup(folder, ours),
        "shared_batch_speedup": _shared_batch_speedup(ours),
    }
    print(json.dumps(result))


def _in_turns(calls: Mapping[str, Callable[[], object]], *, num_rounds: int = _ROUNDS) -> dict[str, list[float]]:
    """Return the times of each call: all are made once before, then in rounds, so that a slow spell meets all."""
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(1 + num_rounds)]
    return {name: [times[name] for times in rounds[1:]] for name in calls}


def _shuffled(reference: Reference) -> np.ndarray:
    """Return the likeliest ids of each row in random order, as if a student had chosen them."""
    return np.random.default_rng(0).permuted(reference.ids_NK, axis=1)


def _differences(ours: OurTeacher, group: TrajectoryGroup, reference: Reference, *, folder: Path) -> dict[str, float]:
    head_VD = load_head(str(folder))
    return {
        name: largest_difference(ours.score(group, request), reference, head_VD=head_VD, normalised=request.normalised)
        for name, request in OURS.items()
    }


def _prefix_sharing_speedup(folder: Path, sharing: OurTeacher) -> float:
    """Return how much faster 8 samples of one long prompt are scored than with the prefix cache off."""
    group = make_group(num_samples=8, prompt_tokens=512, response_tokens=128)
    alone = OurTeacher(folder, enable_prefix_caching=False)
    request = OURS["hidden"]
    times = _in_turns(
        {"alone": partial(alone.score, group, request), "sharing": partial(sharing.score, group, request)}
    )
    return statistics.median(times["alone"]) / statistics.median(times["sharing"])


def _shared_batch_speedup(teacher: OurTeacher) -> float:
    """Return how much faster 32 groups of one short response are scored at once than one after the other."""
    groups = [make_group(num_samples=1, prompt_tokens=16, response_tokens=16)] * 32  # groups share no cached prefix
    request = OURS["hidden"]
    times = _in_turns(
        {
            "alone": lambda: [teacher.score(group, request) for group in groups],
            "together": partial(teacher.score_all, groups, request),
        }
    )
    return statistics.median(times["alone"]) / statistics.median(times["together"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
