"""Training and held-out prompts of a run, tokenised."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_ray.config.data import DataConfig, DataKind, LongPromptPolicy
from opd_ray.config.schema import BatchMode, Config
from opd_ray.data.batches import in_shares
from opd_ray.data.reasoning import reasoning_records
from opd_ray.data.records import Record, as_messages, read_records
from opd_ray.data.tasks import TASKS, verifier
from opd_ray.data.teacher_context import shown_to_teacher
from opd_ray.protocol import Prompt
from opd_ray.routing import check_tasks, context_of, task_config, verifier_name
from opd_ray.schedule import derive_seed

_TRAIN_STREAM, _HELD_OUT_STREAM = 1, 2  # a built-in task makes its two sets from different seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """The prompts of a run."""

    train: list[Prompt]
    held_out: list[Prompt]
    num_dropped: int  # empty or too long, under data.long_prompts=drop
    num_held_back: int  # training records left out because they are held out as well

    @property
    def tasks(self) -> list[str]:
        """Return the tasks of all prompts."""
        return sorted({prompt.task for prompt in (*self.train, *self.held_out)})


def load_prompts(config: Config, *, tokenizer: Any) -> PromptSets:
    """Make or read, split and tokenise the prompts.

    Without `data.eval_path` the last `eval.num_prompts` records of a file are held out and never trained on. Raises
    ValueError, naming file and line, for records that cannot be used.
    """
    data, num_held_out = config.data, config.eval.num_prompts
    if data.kind in (DataKind.task, DataKind.reasoning_gym):
        train, held_out = _task_records(config, as_chat=tokenizer.chat_template is not None)
    else:
        train, held_out = _file_records(data, num_held_out=num_held_out)
    seen = {r.content for r in held_out}
    fresh = [r for r in train if r.content not in seen]
    num_held_back = len(train) - len(fresh)
    train_prompts = list(_tokenise(fresh, config=config, tokenizer=tokenizer))
    held_out_prompts = list(_tokenise(held_out, config=config, tokenizer=tokenizer))
    num_dropped = len(fresh) + len(held_out) - len(train_prompts) - len(held_out_prompts)
    least = config.learner.num_ranks  # every rank gets a group, of the held-out ones too
    if not train_prompts or len(held_out_prompts) < least:
        raise ValueError(
            f"data: {len(train_prompts)} training and {len(held_out_prompts)} held-out prompts are left of"
            f" {len(train) + len(held_out)} ({num_dropped} dropped as empty or longer than"
            f" data.max_prompt_tokens={data.max_prompt_tokens}, {num_held_back} left out of training as equal to"
            f" held-out ones); expected at least one to train on and"
            f" learner.num_ranks={least} held out"
        )
    sets = PromptSets(
        train=train_prompts, held_out=held_out_prompts, num_dropped=num_dropped, num_held_back=num_held_back
    )
    check_tasks(config, sets.tasks)
    _check_numbers(config, sets)
    return sets


def _check_numbers(config: Config, sets: PromptSets) -> None:
    """Refuse a task whose prompts are too few for its evaluation, or whose share of a batch is none."""
    held_out = Counter(prompt.task for prompt in sets.held_out)
    for task, num_held_out in sorted(held_out.items()):
        if num_held_out < config.learner.num_ranks:
            raise ValueError(
                f"data: {num_held_out} held-out prompts have the task {task!r}, which is evaluated by itself: expected"
                f" at least learner.num_ranks={config.learner.num_ranks} of them, or none"
            )
    tasks = sorted({prompt.task for prompt in sets.train})
    counts = in_shares(config.batch.num_prompts, np.array([task_config(config, task).share for task in tasks]))
    for task, count in zip(tasks, counts, strict=True):
        if count == 0 and config.batch.mode is BatchMode.mixed:
            raise ValueError(
                f"tasks.{task}.share={task_config(config, task).share:g}: none of batch.num_prompts="
                f"{config.batch.num_prompts} prompts would be of this task; raise one of the two, or set"
                " batch.mode=sequential"
            )


def _task_records(config: Config, *, as_chat: bool) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records that are made here; the tasks share the held-out ones equally.

    as_chat: a dataset's questions are messages, under the student's chat template.
    """
    tasks = task_names(config.data)
    num_held_out = in_shares(config.eval.num_prompts, np.ones(len(tasks)))
    train, held_out = [], []
    for task, num_of_task in zip(tasks, num_held_out, strict=True):
        make = task_examples if config.data.kind is DataKind.task else reasoning_records
        train += make(task, num_records=config.data.num_prompts, seed=derive_seed(config.seed, _TRAIN_STREAM))
        held_out += make(task, num_records=num_of_task, seed=derive_seed(config.seed, _HELD_OUT_STREAM))
    if config.data.kind is DataKind.reasoning_gym and as_chat:
        return list(map(as_messages, train)), list(map(as_messages, held_out))
    return train, held_out


def task_names(data: DataConfig) -> list[str]:
    """Return the built-in tasks or datasets that prompts are made of."""
    return data.tasks or [data.task or ""]


def task_examples(task: str, *, num_records: int, seed: int) -> list[Record]:
    """Return prompts of a built-in task."""
    return [
        Record(where=f"task {task}", prompt=e.prompt, messages=None, answer=e.answer, task=task)
        for e in TASKS[task].examples(num_examples=num_records, seed=seed)
    ]


def _file_records(data: DataConfig, *, num_held_out: int) -> tuple[list[Record], list[Record]]:
    assert data.path is not None
    records = read_records(data.path, kind=data.kind)
    if data.eval_path is not None:
        return records, read_records(data.eval_path, kind=data.kind, key="data.eval_path")[:num_held_out]
    if len(records) <= num_held_out:
        raise ValueError(
            f"data.path={data.path} holds {len(records)} records, of which eval.num_prompts={num_held_out} would be"
            " held out: expected more records, a smaller eval.num_prompts or a data.eval_path"
        )
    return records[:-num_held_out], records[-num_held_out:]


def _tokenise(records: list[Record], *, config: Config, tokenizer: Any) -> Iterator[Prompt]:
    """Yield the usable records as prompts; refuse or drop the others as `data.long_prompts` says."""
    data = config.data
    refused: list[tuple[Record, int]] = []
    usable: list[tuple[int, Record, list[int]]] = []
    for index, (record, ids) in enumerate(zip(records, token_ids(records, tokenizer=tokenizer), strict=True)):
        if 1 <= len(ids) <= data.max_prompt_tokens:
            usable.append((index, record, ids))
        else:
            refused.append((record, len(ids)))
    for_teacher = _teacher_ids([record for _, record, _ in usable], config=config, tokenizer=tokenizer)
    for (index, record, ids), teacher_ids in zip(usable, for_teacher, strict=True):
        task = _task_of(record, data)
        marked_by = verifier_name(config, task)
        check_answer(marked_by, record)
        yield Prompt(
            ids_P=np.asarray(ids, dtype=np.int32),
            index=index,
            task=task,
            verifier=marked_by,
            answer=record.reference or record.answer,
            teacher_ids_P=np.asarray(teacher_ids, dtype=np.int32),
        )
    if refused and data.long_prompts is LongPromptPolicy.error:
        record, num_tokens = refused[0]
        fault = f"has {num_tokens} tokens" if num_tokens else "is empty"
        raise ValueError(
            f"{record.where}: the prompt {fault}, expected 1 to data.max_prompt_tokens={data.max_prompt_tokens} tokens"
            f" ({len(refused)} of {len(records)} prompts are empty or too long); mend them, raise the limit, or set"
            " data.long_prompts=drop to leave them out"
        )


def _task_of(record: Record, data: DataConfig) -> str:
    return record.task or data.task or "exact"


def _teacher_ids(records: list[Record], *, config: Config, tokenizer: Any) -> list[list[int]]:
    """Return what the teacher reads instead of each prompt; [] where it reads the same."""
    contexts = [context_of(config, _task_of(record, config.data)) for record in records]
    shown = iter(token_ids(shown_to_teacher(records, contexts), tokenizer=tokenizer))
    return [[] if context is None else next(shown) for context in contexts]


def token_ids(records: list[Record], *, tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each prompt, messages under the chat template. Raises ValueError naming a record."""
    of_texts = iter(_plain_ids([r for r in records if r.messages is None], tokenizer=tokenizer))
    return [next(of_texts) if r.messages is None else _chat_ids(r, tokenizer=tokenizer) for r in records]


def _plain_ids(records: list[Record], *, tokenizer: Any) -> list[list[int]]:
    """Encode in one call; on failure one by one, to name the record. Tokenizers raise a bare Exception."""
    texts = [r.prompt for r in records]
    if not texts:
        return []
    try:
        return list(tokenizer(texts, add_special_tokens=True)["input_ids"])
    except Exception:  # noqa: BLE001 - tells which one below, or raises
        return [_encode_one(r, tokenizer=tokenizer) for r in records]


def _encode_one(record: Record, *, tokenizer: Any) -> list[int]:
    try:
        return list(tokenizer(record.prompt, add_special_tokens=True)["input_ids"])
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{record.where}: the student's tokenizer cannot encode the prompt ({error})") from None


def _chat_ids(record: Record, *, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(f"{record.where}: has `messages`, but the student's tokenizer has no chat template")
    try:
        return list(tokenizer.apply_chat_template(record.messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # noqa: BLE001 - a template may raise anything, as of turns in another order
        raise ValueError(f"{record.where}: the student's chat template refuses the messages ({error})") from None


def check_answer(name: str, record: Record) -> None:
    """Refuse now what the verifier would refuse in a worker: an unknown task, an answer it cannot compare to."""
    try:
        verify = verifier(name)
        if record.answer is not None:
            verify("", record.reference or record.answer)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
