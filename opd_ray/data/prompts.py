"""Training and held-out prompts of a run, tokenised; the batch of a step is a function of the step alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_ray.config.schema import Config, DataConfig, DataKind, LongPromptPolicy
from opd_ray.data.records import Record, read_records
from opd_ray.data.tasks import TASKS, verifier
from opd_ray.protocol import Prompt
from opd_ray.schedule import derive_seed

_TRAIN_STREAM, _HELD_OUT_STREAM = 1, 2  # a built-in task makes its two sets from different seeds


class ShuffledPrompts:
    """Endless training batches: each epoch is a permutation of its own, drawn from (seed, epoch)."""

    def __init__(self, prompts: Sequence[Prompt], *, num_prompts: int, seed: int) -> None:
        self._prompts = prompts
        self._num_prompts = num_prompts
        self._seed = seed

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of update `step`: positions step*n to (step+1)*n of the endless stream."""
        size = len(self._prompts)
        positions = range(step * self._num_prompts, (step + 1) * self._num_prompts)
        orders = {epoch: self._order(epoch) for epoch in {p // size for p in positions}}
        return [self._prompts[orders[p // size][p % size]] for p in positions]

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng(derive_seed(self._seed, epoch)).permutation(len(self._prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """The prompts of a run."""

    train: list[Prompt]
    held_out: list[Prompt]
    num_dropped: int  # empty or too long, under data.long_prompts=drop
    num_held_back: int  # training records left out because they are held out as well


def load_prompts(config: Config, *, tokenizer: Any) -> PromptSets:
    """Make or read, split and tokenise the prompts.

    Without `data.eval_path` the last `eval.num_prompts` records of a file are held out and never trained on. Raises
    ValueError, naming file and line, for records that cannot be used.
    """
    data, num_held_out = config.data, config.eval.num_prompts
    if data.kind is DataKind.task:
        train, held_out = _task_records(data, num_held_out=num_held_out, seed=config.seed)
    else:
        train, held_out = _file_records(data, num_held_out=num_held_out)
    seen = {r.content for r in held_out}
    fresh = [r for r in train if r.content not in seen]
    num_held_back = len(train) - len(fresh)
    train_prompts = list(_tokenise(fresh, data=data, tokenizer=tokenizer))
    held_out_prompts = list(_tokenise(held_out, data=data, tokenizer=tokenizer))
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
    return PromptSets(
        train=train_prompts, held_out=held_out_prompts, num_dropped=num_dropped, num_held_back=num_held_back
    )


def _task_records(data: DataConfig, *, num_held_out: int, seed: int) -> tuple[list[Record], list[Record]]:
    assert data.task is not None
    task = TASKS[data.task]

    def records(num_examples: int, stream: int) -> list[Record]:
        return [
            Record(where=f"task {data.task}", prompt=e.prompt, messages=None, answer=e.answer, task=data.task)
            for e in task.examples(num_examples=num_examples, seed=derive_seed(seed, stream))
        ]

    held_out = records(num_held_out, _HELD_OUT_STREAM)
    return records(data.num_prompts, _TRAIN_STREAM), held_out


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


def _tokenise(records: list[Record], *, data: DataConfig, tokenizer: Any) -> Iterator[Prompt]:
    """Yield the usable records as prompts; refuse or drop the others as `data.long_prompts` says."""
    refused: list[tuple[Record, int]] = []
    for index, (record, ids) in enumerate(zip(records, _token_ids(records, tokenizer=tokenizer), strict=True)):
        if not 1 <= len(ids) <= data.max_prompt_tokens:
            refused.append((record, len(ids)))
            continue
        task = record.task or data.task or "exact"
        _check_answer(task, record)
        yield Prompt(ids_P=np.asarray(ids, dtype=np.int32), index=index, task=task, answer=record.answer)
    if refused and data.long_prompts is LongPromptPolicy.error:
        record, num_tokens = refused[0]
        fault = f"has {num_tokens} tokens" if num_tokens else "is empty"
        raise ValueError(
            f"{record.where}: the prompt {fault}, expected 1 to data.max_prompt_tokens={data.max_prompt_tokens} tokens"
            f" ({len(refused)} of {len(records)} prompts are empty or too long); mend them, raise the limit, or set"
            " data.long_prompts=drop to leave them out"
        )


def _token_ids(records: list[Record], *, tokenizer: Any) -> list[list[int]]:
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
    return list(tokenizer.apply_chat_template(record.messages, add_generation_prompt=True, return_dict=False))


def _check_answer(task: str, record: Record) -> None:
    """Refuse now what the verifier would refuse in a worker: an unknown task, an answer it cannot compare to."""
    try:
        verify = verifier(task)
        if record.answer is not None:
            verify("", record.answer)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
