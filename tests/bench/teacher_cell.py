"""The cell of the scoring benchmark: all ways in one process, warm, in turns; prints its numbers as a line of JSON."""

import json
import os
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
from teacher_ways import TOP_K, OurTeacher, PeersTeacher, our_handling, peers_handling, seconds

from opd_ray.protocol import Payload, ScoreRequest, TrajectoryGroup
from workers.output_head import load_head

_ROUNDS = 7
OURS = {
    "sampled": ScoreRequest(payload=Payload.sampled),
    "support_teacher": ScoreRequest(payload=Payload.support, top_k=TOP_K),
    "support_student": ScoreRequest(payload=Payload.support, support="student", top_k=TOP_K, normalised=False),
    "hidden": ScoreRequest(payload=Payload.hidden),
}
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
    handling_s = _in_turns(handling)
    ways = {
        name: {
            "tokens_per_s": num_tokens / score_s[name],
            "python_us": 1e6 * handling_s[name] / num_tokens,
            "bytes": len(handling[name]()) / num_tokens,
        }
        for name in calls
    }
    result = {
        "ways": ways,
        "differences": _differences(ours, group, reference, folder=folder),
        "prefix_sharing_speedup": _prefix_sharing_speedup(folder, ours),
    }
    print(json.dumps(result))


def _in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest time of each call: all are made once before, then in rounds. Others can only slow them."""
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(1 + _ROUNDS)]
    return {name: min(times[name] for times in rounds[1:]) for name in calls}


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
    return times["alone"] / times["sharing"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
