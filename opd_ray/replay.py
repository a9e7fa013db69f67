"""What a recording of scores means to a run that starts: its own manifest, or the one it replays, checked."""

from dataclasses import replace
from pathlib import Path

import workers
from opd_ray.config.schema import Config
from opd_ray.data.models import Models
from opd_ray.data.prompts import PromptSets
from opd_ray.requests import ObjectiveIds
from opd_ray.routing import recorded_scores
from opd_ray.scores import check_recording, manifest_of, prepare_folder, read_recording, recorded_prompts
from opd_ray.state import RunDir


def replayed(config: Config, *, models: Models, prompts: PromptSets, ids: ObjectiveIds) -> tuple[Models, PromptSets]:
    """Return models and prompts as the recording has them that teaches the run; without one as they are.

    Raises ValueError when the recording cannot teach this run.
    """
    folder = recorded_scores(config)
    if folder is None:
        return models, prompts
    run_dir = RunDir.of(config).path
    if Path(folder).resolve().is_relative_to(run_dir):
        raise ValueError(
            f"teacher.cache.path={folder}: lies in this run's own folder {run_dir}; expected another name=..."
        )
    recording = read_recording(folder)
    workers.check_replay(config, recording)
    check_recording(
        config,
        recording,
        tokenizer=models.tokenizer,
        vocab_size=models.vocab_size,
        equivalent_ids=ids.equivalent,
    )
    manifest = recording.manifest
    models = replace(models, vocab_size=manifest.vocab_size, teacher_hidden_size=manifest.teacher_hidden_size)
    return models, recorded_prompts(config, recording, prompts=prompts)


def prepare_recording(config: Config, folder: Path, *, models: Models, ids: ObjectiveIds, step: int) -> None:
    """Make the folder ready when the run records its scores. Raises ValueError when it cannot be written."""
    if config.record_scores:
        manifest = manifest_of(
            config,
            tokenizer=models.tokenizer,
            vocab_size=models.vocab_size,
            teacher_hidden_size=models.teacher_hidden_size,
            equivalent_ids=ids.equivalent,
            head_keys=workers.head_keys(config, vocab_size=models.vocab_size),
        )
        prepare_folder(folder, manifest, step=step)
