"""Recording a run's groups and scores, and training on a recording: what stands between the loop and its fleets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from opd_ray.config.schema import Config
from opd_ray.controller import Fleets
from opd_ray.protocol import Payload
from opd_ray.requests import score_request
from opd_ray.routing import recorded_scores, teacher_key, teachers_of
from opd_ray.scores import Recording, check_offered
from opd_ray.scores.messages import digest
from workers.fleet import kill, spawn_here
from workers.output_head import load_head
from workers.scores.recorder import Recorder, RecordingLearner
from workers.scores.replay import GroupReader, ReplayRollout


@contextmanager
def training_fleets(
    config: Config,
    fleets: Fleets,
    *,
    folder: Path,
    log_dir: Path,
    on_fault: Callable[[str], None],
) -> Iterator[Fleets]:
    """Yield what the loop trains with: the fleets themselves, recorded to a prepared folder, or a recording in their
    place."""
    source = recorded_scores(config)
    if source is not None:
        (reader,) = readers = [spawn_here(GroupReader, name="replay-0", log_dir=log_dir, arguments={"folder": source})]
        try:
            yield replace(fleets, rollout=ReplayRollout(fleets.rollout, reader=reader))
        finally:
            kill(readers)
    elif config.record_scores:
        recorder = spawn_here(Recorder, name="recorder-0", log_dir=log_dir, arguments={"folder": folder})
        learner = RecordingLearner(fleets.learner, recorder=recorder, on_fault=on_fault)
        try:
            yield replace(fleets, learner=learner)
        finally:
            learner.finish()
            kill([recorder])
    else:
        yield fleets


def head_keys(config: Config, *, vocab_size: int) -> dict[str, str]:
    """Return the checksums of the teachers' output heads where hidden states are recorded, by teacher."""
    if score_request(config.objective).payload is not Payload.hidden:
        return {}
    return {name: _head_key(t.path, vocab_size=vocab_size) for name, t in teachers_of(config).by_name.items()}


def check_replay(config: Config, recording: Recording) -> None:
    """Raise ValueError when recorded scores do not hold what the objective asks, or hidden states are of another head
    than teacher.path's."""
    manifest, where = recording.manifest, f"teacher.cache.path={recording.folder}"
    asked = score_request(config.objective)
    check_offered(asked, manifest, where=where)
    if asked.payload is not Payload.hidden:
        return
    teachers = teachers_of(config)
    for task, recorded in sorted({(group.task, group.teacher) for group in recording.groups}):
        name = teachers.name_of(task) if not config.teachers or task in config.teachers else None
        if name is None:
            continue  # a task without a teacher is refused with the prompts
        path, expected = teachers.by_name[name].path, manifest.teachers[recorded]
        if _head_key(path, vocab_size=manifest.vocab_size) != expected.head_key:
            raise ValueError(
                f"{teacher_key(name)}={path}: its output head is not that of {expected.path}, whose hidden states"
                f" {where} holds for the task {task!r}; expected the same model"
            )


def _head_key(path: str, *, vocab_size: int) -> str:
    head = load_head(path, vocab_size=vocab_size).contiguous()
    return digest([(str(head.dtype), np.asarray(head.view(torch.uint8).numpy()))])
