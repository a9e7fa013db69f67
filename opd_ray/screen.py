"""Makes a batch whole before it is learned from: groups that no teacher could score are replaced, or end the run."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd_ray.dispatch import Dispatcher, Flight
from opd_ray.protocol import Batch, CannotGoOn, Metrics
from opd_ray.services import BadGroup, Quarantine

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999...


@dataclass(slots=True)
class _Waits:
    """Seconds spent waiting for rollouts, and then for the last score."""

    rollout_s: float = 0.0
    teacher_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScreen:
    """`Screen` by the teachers' own word."""

    dispatcher: Dispatcher
    max_bad_fraction: float
    quarantine: Quarantine

    def whole(self, batch: Batch) -> tuple[Batch, Metrics]:
        """Wait for a batch; return it with every bad group replaced by one of another prompt, in its place.

        Replacements are sampled by the policy that is about to be updated. `teacher/bad_groups` counts those that were
        bad themselves as well. Raises CannotGoOn when the bad groups are more than max_bad_fraction of the batch, of
        which a single one is not too many unless max_bad_fraction is 0.
        """
        bad, waits, attempt = list[BadGroup](), _Waits(), 0
        found = self._bad_groups(batch, range(len(batch.groups)), waits=waits)
        while found:
            bad += found.values()
            self._check_share(bad, num_groups=len(batch.groups))
            attempt += 1
            batch = self._replaced(batch, list(found), attempt=attempt)
            found = self._bad_groups(batch, list(found), waits=waits)
        return batch, {
            "teacher/bad_groups": float(len(bad)),
            "time/wait_rollout_s": waits.rollout_s,
            "time/wait_teacher_s": waits.teacher_s,
        }

    def _bad_groups(self, batch: Batch, positions: Sequence[int], *, waits: _Waits) -> dict[int, BadGroup]:
        """Wait for the groups at some positions and quarantine the bad ones; return these by position."""
        start = time.perf_counter()
        summaries = self.dispatcher.rollout.summaries([batch.groups[i] for i in positions])
        generated = time.perf_counter()
        scores = self.dispatcher.teacher.summaries([batch.scores[i] for i in positions])
        waits.rollout_s += generated - start
        waits.teacher_s += time.perf_counter() - generated
        found = {
            position: BadGroup(
                step=batch.step + 1,
                held_out=False,
                teacher=batch.scores[position].teacher,
                seed=batch.groups[position].request.seed,
                reason=score.fault,
                summary=summary,
            )
            for position, summary, score in zip(positions, summaries, scores, strict=True)
            if score.fault
        }
        for group in found.values():
            self.quarantine.add(group)
        return found

    def _replaced(self, batch: Batch, positions: Sequence[int], *, attempt: int) -> Batch:
        """Start a replacement for each position, and have it scored."""
        places = [Flight(group=batch.groups[i], score=batch.scores[i]).place for i in positions]
        flights = dict(zip(positions, self.dispatcher.start(places, version=batch.step, attempt=attempt), strict=True))
        return replace(
            batch,
            groups=[flights[i].group if i in flights else group for i, group in enumerate(batch.groups)],
            scores=[flights[i].score if i in flights else score for i, score in enumerate(batch.scores)],
        )

    def _check_share(self, bad: Sequence[BadGroup], *, num_groups: int) -> None:
        allowed = max(int(self.max_bad_fraction * num_groups + _ROUNDING), 1 if self.max_bad_fraction > 0 else 0)
        if len(bad) <= allowed:
            return
        counts = ", ".join(f"{name} {count}" for name, count in Counter(group.teacher for group in bad).items())
        raise CannotGoOn(
            f"update {bad[0].step}: {len(bad)} groups could not be scored, batch.max_bad_fraction="
            f"{self.max_bad_fraction:g} allows {allowed} of {num_groups}; by teacher: {counts}; the first:"
            f" {bad[0].reason}; all are in {self.quarantine.where}"
        )
