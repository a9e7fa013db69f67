from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from config_files import MANDATORY, compose_config, refusal
from fakes import make_prompt
from recordings import make_recorded_group, make_scored, record

from opd_ray.config.schema import Config
from opd_ray.data.batches import ShuffledPrompts
from opd_ray.data.prompts import PromptSets
from opd_ray.protocol import Prompt
from opd_ray.scores import Recording, recorded_prompts

OTHER = replace(make_prompt(0, task="sort"), ids_P=np.array([9, 9], dtype=np.int32))


def sets(*held_out: Prompt) -> PromptSets:
    return PromptSets(train=[OTHER], held_out=list(held_out), num_dropped=3, num_held_back=5)


def recorded(folder: Path) -> tuple[Config, Recording]:
    config = compose_config(*MANDATORY, "teacher=cache", f"teacher.cache.path={folder}")
    groups = [make_scored(make_recorded_group(i, i + 1)) for i in range(1, 6)]
    return config, record(folder, compose_config(*MANDATORY), [groups[:3], groups[3:]])


def in_order(train: list[Prompt], *, num_prompts: int = 2, seed: int = 0) -> ShuffledPrompts:
    return ShuffledPrompts(train, num_prompts=num_prompts, seed=seed, first_in_order=True)


def batches(source: ShuffledPrompts, steps: range) -> list[list[int]]:
    return [[prompt.index for prompt in source.batch(step)] for step in steps]


def test_the_prompts_are_the_places_of_the_recording_without_held_out_ones(tmp_path: Path):
    config, recording = recorded(tmp_path)
    held_out = replace(OTHER, ids_P=np.array([2, 3], dtype=np.int64))
    made = recorded_prompts(config, recording, prompts=sets(OTHER, held_out))
    assert [p.index for p in made.train] == [0, 2, 3, 4]
    assert {(p.task, p.verifier) for p in made.train} == {("sort", "sort")}
    assert (made.num_held_back, made.num_dropped) == (1, 0)
    assert made.held_out == [OTHER, held_out]


def test_a_recording_that_is_held_out_whole_is_refused(tmp_path: Path):
    config, recording = recorded(tmp_path)
    held_out = [replace(OTHER, ids_P=np.array([i, i + 1], dtype=np.int32)) for i in range(1, 6)]
    words = refusal(lambda: recorded_prompts(config, recording, prompts=sets(*held_out)))
    assert "every recorded prompt is held out" in words


def test_a_recorded_task_without_a_teacher_is_refused(tmp_path: Path):
    _, recording = recorded(tmp_path)
    entry = f"{{path: t, kind: cache, cache: {{path: '{tmp_path}'}}}}"
    config = compose_config(*MANDATORY, f"+teachers={{copy: {entry}}}")
    words = refusal(lambda: recorded_prompts(config, recording, prompts=sets(replace(OTHER, task="copy"))))
    assert "task 'sort' has no teacher" in words


def test_the_first_epoch_keeps_the_recorded_order_and_later_ones_are_shuffled_by_the_seed(tmp_path: Path):
    config, recording = recorded(tmp_path)
    train = recorded_prompts(config, recording, prompts=sets(OTHER)).train
    source = in_order(train, seed=1)
    flat = [index for batch in batches(source, range(10)) for index in batch]
    epochs = [flat[i : i + 5] for i in range(0, 20, 5)]
    assert epochs[0] == [0, 1, 2, 3, 4]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    assert batches(in_order(train, seed=1), range(7, 10)) == batches(source, range(7, 10))
    assert batches(in_order(train, seed=2), range(3, 10)) != batches(source, range(3, 10))


@pytest.mark.parametrize("num_prompts", [7, 12])
def test_a_batch_may_be_larger_than_the_recording(tmp_path: Path, num_prompts: int):
    config, recording = recorded(tmp_path)
    train = recorded_prompts(config, recording, prompts=sets(OTHER)).train
    (batch,) = batches(in_order(train, num_prompts=num_prompts), range(1))
    assert len(batch) == num_prompts
    assert batch[:5] == [0, 1, 2, 3, 4]


def test_a_recorded_group_is_replaced_by_another_of_its_task_that_the_update_has_not(tmp_path: Path):
    config, recording = recorded(tmp_path)
    train = recorded_prompts(config, recording, prompts=sets(OTHER)).train
    source = in_order([*train, replace(OTHER, index=9, task="copy")], seed=1)
    others = [source.replacement(0, position=1, attempt=attempt).index for attempt in (1, 2, 3, 4)]
    assert sorted(others[:3]) == [2, 3, 4]
    assert others[3] == others[0]
