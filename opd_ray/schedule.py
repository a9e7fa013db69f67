"""When things happen in a run, and with which seed: pure functions of the step."""

import hashlib
import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The run's calendar. Step t is the state after t updates; it equals the student's version."""

    num_steps: int
    max_staleness: int  # batches in flight beyond the one being learned from; 0 is strictly on-policy
    eval_every: int  # 0: only the first and the last step
    save_every: int  # 0: never

    def is_eval(self, step: int) -> bool:
        """Whether the student is evaluated after update `step`."""
        return step in (0, self.num_steps) or (self.eval_every > 0 and step % self.eval_every == 0)

    def is_save(self, step: int) -> bool:
        """Whether a checkpoint is written after update `step`."""
        return self.save_every > 0 and (step % self.save_every == 0 or step == self.num_steps)


def derive_seed(*parts: int) -> int:
    """Mix integers into one seed in [0, 2^31): the same parts give the same seed on every machine."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little") & 0x7FFFFFFF


def request_seed(seed: int, *, step: int, prompt_index: int, position: int, attempt: int = 0) -> int:
    """Return the seed of a group: of the prompt at a position of update `step`, or of its `attempt`-th replacement."""
    parts = (seed, step, prompt_index, position)
    return derive_seed(*parts, attempt) if attempt else derive_seed(*parts)
