"""Keeps the groups that no teacher could score, in the run dir."""

from collections.abc import Callable

from opd_ray.json_lines import JsonLines
from opd_ray.services import BadGroup
from opd_ray.state import RunDir
from opd_ray.tracking import record_event


class DiskQuarantine:
    """`Quarantine` in quarantine.jsonl; each group is an event as well, the first one a line on the console."""

    def __init__(self, run_dir: RunDir, *, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._say = say
        self._is_first = True
        self._lines = JsonLines(run_dir.path, warn=lambda words: say(f"warning: {words}"))

    @property
    def where(self) -> str:
        """Return the path of the file."""
        return str(self._run_dir.quarantine)

    def add(self, group: BadGroup) -> None:
        """Record a group: what it was, and why it has no score."""
        record = {
            "step": group.step,
            "held_out": group.held_out,
            "prompt_index": group.summary.prompt_index,
            "task": group.summary.task,
            "teacher": group.teacher,
            "seed": group.seed,
            "version": group.summary.oldest_version,
            "reason": group.reason,
            "text": group.summary.text,
        }
        self._lines.append(self._run_dir.quarantine.name, record)
        place = f"held out, version {group.step}" if group.held_out else f"update {group.step}"
        message = f"{place}, prompt {group.summary.prompt_index}: {group.teacher} cannot score it: {group.reason}"
        record_event(self._run_dir, kind="bad_group", message=message)
        if self._is_first:
            self._say(f"warning: {message}; this one and others to come are in {self.where}")
        self._is_first = False

    def warn(self, message: str) -> None:
        """Tell what follows from bad groups."""
        record_event(self._run_dir, kind="bad_groups", message=message)
        self._say(f"warning: {message}")
