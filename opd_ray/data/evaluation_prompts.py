"""What an evaluation asks of a model, how much it may answer, and which folder the model is."""

from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.config.data import DataKind
from opd_ray.config.evaluate import EvaluateConfig
from opd_ray.data.prompts import check_answer, task_examples, token_ids
from opd_ray.data.reasoning import check_dataset, reasoning_records
from opd_ray.data.records import Record, as_messages, read_records
from opd_ray.data.tasks import TASKS
from opd_ray.protocol import Prompt
from opd_ray.schedule import derive_seed

_SEED_STREAM = 5
_REASONING = "reasoning_gym"
_MAX_RESPONSE_TOKENS = 1024  # unless the model has room for fewer, or the configuration says
_OF_CHECKPOINTS = ("MANIFEST.json", "zero_to_fp32.py", "*_states.pt", "step-*/MANIFEST.json")


def model_folder(model: str) -> str:
    """Return the folder of a model: that itself, or the student that a run has exported; a hub name as it is.

    Raises ValueError for a run without an export, for a DeepSpeed checkpoint, and for a path that is not there.
    """
    folder = Path(model)
    if any(next(folder.glob(pattern), None) for pattern in _OF_CHECKPOINTS):
        raise ValueError(
            f"model={model}: a checkpoint of the learner's shards, which only a run reads; expected the run's export/"
            " (resume=auto num_steps=<the checkpoint's step> writes it)"
        )
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir():
        if not (folder / "export" / "config.json").exists():
            raise ValueError(
                f"model={model}: the run has no export/ yet, it is written at its end; resume=auto goes on with it"
            )
        return str(folder / "export")
    looks_local = folder.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"model={model}: there is no such folder; expected a Hugging Face folder, a hub name or a run dir"
        )
    return model


def evaluation_prompts(config: EvaluateConfig, *, tokenizer: Any) -> list[Prompt]:
    """Return the prompts, all with answers. Raises ValueError naming the key or the file's line at fault."""
    records = _records(config)
    if tokenizer.chat_template is not None and config.data is None and config.task not in TASKS:
        records = [as_messages(record) for record in records]
    prompts = []
    for index, (record, ids) in enumerate(zip(records, token_ids(records, tokenizer=tokenizer), strict=True)):
        if not 1 <= len(ids) <= config.max_prompt_tokens:
            raise ValueError(
                f"{record.where}: the prompt has {len(ids)} tokens, expected 1 to"
                f" max_prompt_tokens={config.max_prompt_tokens}"
            )
        if record.answer is None and record.reference is None:
            raise ValueError(f"{record.where}: has no `answer` to mark responses by; expected one in every record")
        verifier = _REASONING if record.reference else record.task or config.task or "exact"
        check_answer(verifier, record)
        prompts.append(
            Prompt(
                ids_P=np.asarray(ids, dtype=np.int32),
                index=index,
                task=record.task or config.task or "exact",
                verifier=verifier,
                answer=record.reference or record.answer,
            )
        )
    return prompts


def response_tokens(config: EvaluateConfig, *, prompt_tokens: int, positions: int | None) -> int:
    """Return the length of a response at the most behind prompts of up to prompt_tokens; positions: of the model.

    Raises ValueError when the model has no room for what is asked for.
    """
    asked = config.max_response_tokens
    if positions is None:
        return asked or _MAX_RESPONSE_TOKENS
    room = positions - prompt_tokens
    if room < (asked or 1):
        raise ValueError(
            f"max_response_tokens={asked or 1} behind prompts of up to {prompt_tokens} tokens: model={config.model} has"
            f" {positions} positions; expected at most {max(room, 0)}, or shorter prompts"
        )
    return asked or min(_MAX_RESPONSE_TOKENS, room)


def _records(config: EvaluateConfig) -> list[Record]:
    if config.data is not None:
        kind = DataKind.parquet if config.data.endswith(".parquet") else DataKind.jsonl
        return read_records(config.data, kind=kind, key="data")[: config.num_prompts]
    task, seed = str(config.task), derive_seed(config.seed, _SEED_STREAM)
    library, _, name = task.partition("/")
    if library == _REASONING:
        check_dataset("task", name)
        return reasoning_records(name, num_records=config.num_prompts, seed=seed)
    if task not in TASKS:
        raise ValueError(
            f"task={task}: expected a built-in task ({', '.join(TASKS)}) or reasoning_gym/<dataset>; a verifier needs"
            " data=<file> as well"
        )
    return task_examples(task, num_records=config.num_prompts, seed=seed)
