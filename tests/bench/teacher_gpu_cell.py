"""The cell of part `teacher_gpu`: one worker, warm; prints the tokens/s of each payload as a line of JSON."""

import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path

# As in a worker (workers/fleet.py); set before vLLM is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

from teacher_problem import make_group
from teacher_ways import OURS, TOP_K, OurTeacher, seconds
from transformers import AutoConfig

from opd_ray.config.schema import Dtype

_RESPONSE_TOKENS = 1023  # and a prompt token
_ROUNDS = 5


def main(folder: Path, gpus: int, num_sequences: int) -> None:
    """Measure every payload on the same sequences, each a group that arrives with the others."""
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    engine_args = {"load_format": "dummy", "kv_cache_memory_bytes": (16 if gpus else 1) << 30}
    teacher = OurTeacher(folder, dtype=Dtype.bfloat16, gpus=gpus, vocab_size=vocab_size, **engine_args)
    group = make_group(
        num_samples=1, prompt_tokens=1, response_tokens=_RESPONSE_TOKENS, vocab_size=vocab_size, support_size=TOP_K
    )
    calls = {name: partial(teacher.score_all, [group] * num_sequences, request) for name, request in OURS.items()}
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(1 + _ROUNDS)]
    num_tokens = num_sequences * (1 + _RESPONSE_TOKENS)
    print(json.dumps({n: num_tokens / statistics.median(times[n] for times in rounds[1:]) for n in calls}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
