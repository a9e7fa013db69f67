import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from config_files import compose_config, refusal
from fakes import make_prompt
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.config.schema import BatchMode
from opd_ray.data.batches import ShuffledPrompts, TaskPrompts, in_shares
from opd_ray.data.prompts import PromptSets, load_prompts
from opd_ray.data.tiny_models import build_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def tokenizer_with(template: str | None = None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*overrides: str, template: str | None = None) -> PromptSets:
    config = compose_config("experiment=demo", "learner.num_ranks=1", *overrides)
    return load_prompts(config, tokenizer=tokenizer_with(template))


def load_file(folder: Path, rows: list[dict], *overrides: str, template: str | None = None) -> PromptSets:
    path = write(folder / "prompts.jsonl", rows)
    common = ("data=jsonl", "data.task=null", "student.build=null", "teacher.build=null", "eval.num_prompts=2")
    return load(*common, f"data.path={path}", *overrides, template=template)


def texts(prompts: list) -> list[str]:
    tokenizer = build_tokenizer()
    return [tokenizer.decode(prompt.ids_P) for prompt in prompts]


def shuffled(*, size: int, num_prompts: int, seed: int = 0) -> ShuffledPrompts:
    return ShuffledPrompts([make_prompt(i) for i in range(size)], num_prompts=num_prompts, seed=seed)


def indices(prompts: list) -> list[int]:
    return [prompt.index for prompt in prompts]


SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
SIZES = {"copy": 5, "exact": 3, "sort": 7}  # prompts of each task
TASK_SHARES = st.fixed_dictionaries(dict.fromkeys(SIZES, st.sampled_from([0.5, 1.0, 1.5, 2.0, 5.0])))
MODES = st.sampled_from(BatchMode)


def of_tasks(
    mode: BatchMode, *, num_prompts: int, shares: Mapping[str, float], seed: int = 0, sizes: Mapping[str, int] = SIZES
) -> TaskPrompts:
    prompts = [make_prompt(i, task=task) for task, size in sizes.items() for i in range(size)]
    return TaskPrompts(prompts[::-1], num_prompts=num_prompts, shares=shares, mode=mode, seed=seed)


def known(prompts: list) -> list[tuple[str, int]]:
    return [(prompt.task, prompt.index) for prompt in prompts]


def webster(total: int, shares: list[float]) -> list[int]:
    """Deal a total out one by one, each to the part with the largest share / (part + 1/2), the first of equals."""
    parts = [0] * len(shares)
    for _ in range(total):
        priorities = [share / (part + 0.5) for share, part in zip(shares, parts, strict=True)]
        parts[priorities.index(max(priorities))] += 1
    return parts


@given(total=st.integers(0, 300), shares=SHARES)
def test_parts_in_shares_sum_to_the_total_and_none_falls_when_the_total_grows(total: int, shares: list[float]):
    parts, more = in_shares(total, np.array(shares)), in_shares(total + 1, np.array(shares))
    assert sum(parts) == total
    assert sorted(after - before for before, after in zip(parts, more, strict=True)) == [0] * (len(shares) - 1) + [1]


@given(total=st.integers(0, 300), shares=SHARES)
def test_parts_in_shares_are_those_that_dealing_out_one_by_one_gives(total: int, shares: list[float]):
    assert in_shares(total, np.array(shares)) == webster(total, shares)


@given(total=st.integers(0, 10_000), shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=3))
def test_up_to_three_parts_are_within_one_of_their_exact_proportion(total: int, shares: list[float]):
    for part, share in zip(in_shares(total, np.array(shares)), shares, strict=True):
        assert abs(part - total * share / sum(shares)) < 1 + 1e-9


@given(total=st.integers(0, 10_000), shares=SHARES)
def test_any_number_of_parts_stay_near_their_exact_proportion_however_large_the_total(total: int, shares: list[float]):
    for part, share in zip(in_shares(total, np.array(shares)), shares, strict=True):
        assert abs(part - total * share / sum(shares)) <= (len(shares) + 1) / 2 + 1e-9


@pytest.mark.parametrize(
    ("total", "shares", "parts"),
    [(64, [1, 1], [32, 32]), (5, [1, 1], [3, 2]), (8, [3, 1], [6, 2]), (10, [2, 2, 1], [4, 4, 2]), (0, [1, 2], [0, 0])],
)
def test_parts_in_shares_are_what_a_person_would_give(total: int, shares: list[float], parts: list[int]):
    assert in_shares(total, np.array(shares, dtype=float)) == parts


@given(step=st.integers(0, 50), num_prompts=st.integers(1, 20), shares=TASK_SHARES)
def test_every_mixed_batch_has_of_every_task_its_share(step: int, num_prompts: int, shares: dict[str, float]):
    batch = of_tasks(BatchMode.mixed, num_prompts=num_prompts, shares=shares).batch(step)
    counts = Counter(prompt.task for prompt in batch)
    expected = webster(num_prompts, [shares[task] for task in sorted(SIZES)])
    assert [counts[task] for task in sorted(SIZES)] == expected


@given(num_steps=st.integers(1, 40), shares=TASK_SHARES)
def test_sequential_batches_are_each_of_one_task_and_the_tasks_take_turns_in_their_shares(
    num_steps: int, shares: dict[str, float]
):
    source = of_tasks(BatchMode.sequential, num_prompts=4, shares=shares)
    batches = [source.batch(step) for step in range(num_steps)]
    assert all(len(batch) == 4 and len({prompt.task for prompt in batch}) == 1 for batch in batches)
    turns = Counter(batch[0].task for batch in batches)
    assert [turns[task] for task in sorted(SIZES)] == webster(num_steps, [shares[task] for task in sorted(SIZES)])


def test_sequential_batches_of_equal_shares_go_round():
    source = of_tasks(BatchMode.sequential, num_prompts=2, shares=dict.fromkeys(SIZES, 1.0))
    assert [source.batch(step)[0].task for step in range(7)] == ["copy", "exact", "sort"] * 2 + ["copy"]


@given(mode=MODES, num_prompts=st.integers(3, 12), seed=st.integers(0, 99))
def test_the_prompts_of_every_task_come_in_whole_epochs_whatever_the_mode(mode: BatchMode, num_prompts: int, seed: int):
    source = of_tasks(mode, num_prompts=num_prompts, shares=dict.fromkeys(SIZES, 1.0), seed=seed)
    stream = [prompt for step in range(30) for prompt in source.batch(step)]
    for task, size in SIZES.items():
        of_task = [prompt.index for prompt in stream if prompt.task == task]
        assert len(of_task) >= 2 * size
        for epoch in range(len(of_task) // size):
            assert sorted(of_task[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(mode=MODES, step=st.integers(0, 200), shares=TASK_SHARES, seed=st.integers(0, 99))
def test_the_batch_of_several_tasks_is_a_function_of_the_step_alone(
    mode: BatchMode, step: int, shares: dict[str, float], seed: int
):
    first, second = (of_tasks(mode, num_prompts=5, shares=shares, seed=seed) for _ in range(2))
    first.batch(step + 3)
    assert known(first.batch(step)) == known(second.batch(step)) == known(first.batch(step))


@given(mode=MODES, step=st.integers(0, 50), num_prompts=st.integers(1, 9), seed=st.integers(0, 99))
def test_of_one_task_the_batches_are_those_of_its_prompts_alone(
    mode: BatchMode, step: int, num_prompts: int, seed: int
):
    prompts = [make_prompt(i) for i in range(7)]
    source = TaskPrompts(prompts, num_prompts=num_prompts, shares={"exact": 0.3}, mode=mode, seed=seed)
    assert known(source.batch(step)) == known(shuffled(size=7, num_prompts=num_prompts, seed=seed).batch(step))


@given(mode=MODES, seed=st.integers(0, 5), step=st.integers(0, 20), num_prompts=st.integers(3, 6))
def test_a_replacement_is_another_prompt_of_the_same_task_and_the_attempts_differ(
    mode: BatchMode, seed: int, step: int, num_prompts: int
):
    sizes = {"copy": 20, "sort": 30}
    source = of_tasks(mode, num_prompts=num_prompts, shares=dict.fromkeys(sizes, 1.0), seed=seed, sizes=sizes)
    batch = source.batch(step)
    for position, replaced in enumerate(batch):
        others = [source.replacement(step, position=position, attempt=attempt) for attempt in (1, 2, 3)]
        assert {other.task for other in others} == {replaced.task}
        assert not set(known(others)) & set(known(batch))
        assert len(set(known(others))) == 3


def test_replacements_depend_on_seed_step_and_position_and_on_nothing_that_was_asked_before():
    def drawn(*, seed: int, step: int, position: int) -> int:
        source = of_tasks(BatchMode.mixed, num_prompts=4, shares={"sort": 1.0}, seed=seed, sizes={"sort": 500})
        return source.replacement(step, position=position, attempt=1).index

    first = drawn(seed=0, step=3, position=1)
    assert drawn(seed=0, step=3, position=1) == first
    others = [drawn(seed=1, step=3, position=1), drawn(seed=0, step=4, position=1), drawn(seed=0, step=3, position=2)]
    assert len({first, *others}) == 4
    source = of_tasks(BatchMode.mixed, num_prompts=4, shares={"sort": 1.0}, sizes={"sort": 500})
    source.replacement(2, position=0, attempt=1)
    assert source.replacement(3, position=1, attempt=1).index == first


def test_where_every_prompt_is_in_the_batch_a_replacement_is_one_of_them():
    source = of_tasks(BatchMode.mixed, num_prompts=3, shares={"exact": 1.0}, sizes={"exact": 3})
    assert known([source.replacement(0, position=1, attempt=1)])[0] in known(source.batch(0))


def test_the_tasks_have_orders_of_their_own():
    sizes = {"copy": 50, "sort": 50}
    batch = of_tasks(BatchMode.mixed, num_prompts=100, shares=dict.fromkeys(sizes, 1.0), sizes=sizes).batch(0)
    orders = [[prompt.index for prompt in batch if prompt.task == task] for task in sizes]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@given(size=st.integers(1, 12), num_prompts=st.integers(1, 15), num_epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_epoch_visits_every_prompt_once(size: int, num_prompts: int, num_epochs: int, seed: int):
    source = shuffled(size=size, num_prompts=num_prompts, seed=seed)
    num_steps = -(-num_epochs * size // num_prompts)
    stream = [index for step in range(num_steps) for index in indices(source.batch(step))]
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(step=st.integers(0, 1000), seed=st.integers(0, 99))
def test_the_batch_of_a_step_is_a_function_of_the_step_alone(step: int, seed: int):
    first, second = shuffled(size=7, num_prompts=4, seed=seed), shuffled(size=7, num_prompts=4, seed=seed)
    first.batch(step + 3)
    assert indices(first.batch(step)) == indices(second.batch(step)) == indices(first.batch(step))


def test_epochs_and_seeds_have_orders_of_their_own():
    epochs = [indices(shuffled(size=50, num_prompts=50, seed=seed).batch(e)) for seed in (0, 1) for e in (0, 1)]
    assert len(set(map(tuple, epochs))) == 4


def test_the_prompts_of_a_task_are_tokenised_whole_and_carry_their_answers():
    sets = load("data.num_prompts=20", "eval.num_prompts=4")
    assert len(sets.held_out) == 4
    assert sets.num_dropped == 0
    for prompt, text in zip(sets.train, texts(sets.train), strict=True):
        assert prompt.ids_P.dtype == np.int32
        assert text.endswith("=")
        assert prompt.task == "sort"
        assert prompt.answer == "".join(sorted(text[:-1].split("+")))


def test_no_held_out_prompt_of_a_task_is_trained_on_and_the_seed_names_both_sets():
    sets, same, other = (load("data.num_prompts=500", f"seed={seed}") for seed in (1, 1, 2))
    assert not set(texts(sets.train)) & set(texts(sets.held_out))
    assert texts(sets.train) == texts(same.train)
    assert texts(sets.held_out) == texts(same.held_out)
    assert texts(sets.held_out) != texts(other.held_out)


def test_training_prompts_are_known_by_their_positions():
    assert indices(load("data.num_prompts=20", "eval.num_prompts=4").train) == list(range(20))


def test_the_last_records_of_a_file_are_held_out(tmp_path: Path):
    sets = load_file(tmp_path, [{"prompt": str(digit)} for digit in range(6)])
    assert texts(sets.train) == ["0", "1", "2", "3"]
    assert texts(sets.held_out) == ["4", "5"]


def test_a_held_out_prompt_that_stands_among_the_training_records_too_is_not_trained_on(tmp_path: Path):
    sets = load_file(tmp_path, [{"prompt": text} for text in ("1", "2", "3", "2", "4")])
    assert not set(texts(sets.train)) & set(texts(sets.held_out))


def test_a_file_of_its_own_for_evaluation_leaves_all_records_to_training(tmp_path: Path):
    held_out = write(tmp_path / "held-out.jsonl", [{"prompt": text} for text in "789"])
    sets = load_file(tmp_path, [{"prompt": text} for text in "123"], f"data.eval_path={held_out}")
    assert texts(sets.train) == ["1", "2", "3"]
    assert texts(sets.held_out) == ["7", "8"]


def test_a_missing_evaluation_file_is_named_by_its_own_key(tmp_path: Path):
    words = refusal(lambda: load_file(tmp_path, [{"prompt": "1"}], f"data.eval_path={tmp_path}/no.jsonl"))
    assert words == f"data.eval_path={tmp_path}/no.jsonl: no such file"


def test_a_file_with_too_few_records_to_hold_some_out_is_refused(tmp_path: Path):
    words = refusal(lambda: load_file(tmp_path, [{"prompt": "1"}, {"prompt": "2"}]))
    assert "holds 2 records, of which eval.num_prompts=2 would be held out" in words
    assert "data.eval_path" in words


def test_empty_and_long_prompts_are_refused_with_their_count_and_the_way_out(tmp_path: Path):
    rows = [{"prompt": text} for text in ("1", "1+2+3", "", "2", "3", "4")]
    words = refusal(lambda: load_file(tmp_path, rows, "data.max_prompt_tokens=4"))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: the prompt has 5 tokens")
    assert "data.max_prompt_tokens=4 tokens (2 of 4 prompts are empty or too long)" in words
    assert "data.long_prompts=drop" in words


def test_an_empty_prompt_is_called_empty(tmp_path: Path):
    words = refusal(lambda: load_file(tmp_path, [{"prompt": text} for text in ("1", "", "2", "3")]))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: the prompt is empty")


def test_empty_and_long_prompts_are_dropped_and_counted_when_asked(tmp_path: Path):
    rows = [{"prompt": text} for text in ("1", "1+2+3", "", "2", "1+2+4", "4")]
    sets = load_file(tmp_path, rows, "data.max_prompt_tokens=4", "data.long_prompts=drop")
    assert texts(sets.train) == ["1", "2"]
    assert texts(sets.held_out) == ["4"]
    assert sets.num_dropped == 3


def test_a_prompt_of_just_the_limit_is_taken(tmp_path: Path):
    sets = load_file(tmp_path, [{"prompt": "1+2="}] + [{"prompt": t} for t in "123"], "data.max_prompt_tokens=4")
    assert texts(sets.train)[0] == "1+2="


def test_nothing_left_after_dropping_is_refused_with_the_counts(tmp_path: Path):
    rows = [{"prompt": f"1+2+{digit}"} for digit in range(4)]
    words = refusal(lambda: load_file(tmp_path, rows, "data.max_prompt_tokens=4", "data.long_prompts=drop"))
    assert "0 training and 0 held-out prompts are left of 4 (4 dropped" in words


def test_fewer_held_out_prompts_than_ranks_are_refused(tmp_path: Path):
    held_out = write(tmp_path / "held-out.jsonl", [{"prompt": "7"}])
    rows = [{"prompt": text} for text in "123"]
    words = refusal(lambda: load_file(tmp_path, rows, f"data.eval_path={held_out}", "learner.num_ranks=2"))
    assert "1 held-out prompts are left" in words
    assert "learner.num_ranks=2" in words


def test_training_records_that_are_held_out_too_are_counted(tmp_path: Path):
    words = refusal(lambda: load_file(tmp_path, [{"prompt": "1"}] * 4))
    assert "0 training and 2 held-out prompts are left of 4" in words


def test_messages_go_through_the_chat_template_with_the_turn_of_the_assistant_opened(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": f"1+{digit}"}]} for digit in range(3)]
    rows.insert(1, {"prompt": "7+7"})
    sets = load_file(tmp_path, rows, template=CHAT_TEMPLATE)
    assert texts(sets.train) == ["1+0=", "7+7"]
    assert texts(sets.held_out) == ["1+1=", "1+2="]


def test_messages_without_a_chat_template_are_refused_with_file_and_line(tmp_path: Path):
    rows = [{"prompt": "1"}, {"messages": [{"role": "user", "content": "1+1"}]}, {"prompt": "2"}, {"prompt": "3"}]
    words = refusal(lambda: load_file(tmp_path, rows))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: has `messages`")
    assert "no chat template" in words


@pytest.mark.parametrize(("content", "fault"), [("no", "roles must take turns"), ("\ud800", "TextEncodeInput")])
def test_messages_that_the_chat_template_or_the_tokenizer_refuses_are_named(tmp_path: Path, content: str, fault: str):
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('roles must take turns') }}{% endif %}"
    rows: list[dict] = [{"prompt": "1"}, {"messages": [{"role": "user", "content": content}]}] + [{"prompt": "2"}] * 2
    words = refusal(lambda: load_file(tmp_path, rows, template=template + CHAT_TEMPLATE))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: the student's chat template refuses the messages (")
    assert re.search(fault, words)


def test_an_unknown_task_is_named_with_file_and_line(tmp_path: Path):
    words = refusal(
        lambda: load_file(
            tmp_path, [{"prompt": "1"}, {"prompt": "2", "task": "maths"}, {"prompt": "3"}, {"prompt": "4"}]
        )
    )
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: unknown verifier 'maths'")


def test_an_answer_that_the_verifier_cannot_compare_to_is_named_with_file_and_line(tmp_path: Path):
    answers = enumerate(("4", "four", "5", "6"))
    rows = [{"prompt": str(digit), "task": "numeric", "answer": answer} for digit, answer in answers]
    words = refusal(lambda: load_file(tmp_path, rows))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2: verifier 'numeric' expects an answer that holds a num")


def test_the_task_of_a_record_goes_before_that_of_the_file_and_that_before_exact(tmp_path: Path):
    rows = [{"prompt": "1", "task": "sort"}] + [{"prompt": text} for text in "234"]
    assert [p.task for p in load_file(tmp_path, rows, "data.task=numeric").train] == ["sort", "numeric"]
    assert [p.task for p in load_file(tmp_path, rows).train] == ["sort", "exact"]


def test_text_that_the_tokenizer_cannot_encode_is_refused_with_file_and_line(tmp_path: Path):
    words = refusal(lambda: load_file(tmp_path, [{"prompt": text} for text in ("1", "x", "2", "3")]))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 2")


TWO_TASKS = ("data.tasks=[sort,copy]", "data.max_prompt_tokens=25")  # copy's prompts end with two signs


def test_several_built_in_tasks_give_each_its_prompts_and_share_the_held_out_ones_equally():
    sets = load(*TWO_TASKS, "data.num_prompts=20", "eval.num_prompts=5")
    assert sets.tasks == ["copy", "sort"]
    assert Counter(p.task for p in sets.train) == {"sort": 20, "copy": 20}
    assert Counter(p.task for p in sets.held_out) == {"sort": 3, "copy": 2}
    assert indices(sets.train) == list(range(40))
    for prompt, text in zip(sets.train + sets.held_out, texts(sets.train + sets.held_out), strict=True):
        digits = text.rstrip("=").split("+")
        assert prompt.verifier == prompt.task
        assert (text.count("="), prompt.answer) == {
            "sort": (1, "".join(sorted(digits))),
            "copy": (2, "".join(digits)),
        }[prompt.task]


def test_a_list_of_one_built_in_task_is_that_task():
    one, same = load("data.tasks=[sort]", "data.num_prompts=20"), load("data.task=sort", "data.num_prompts=20")
    assert texts(one.train) == texts(same.train)
    assert texts(one.held_out) == texts(same.held_out)


def test_records_of_several_tasks_keep_them_and_are_marked_by_the_verifiers_that_the_tasks_name(tmp_path: Path):
    rows = [{"prompt": "1", "task": "maths", "answer": "7"}, {"prompt": "2", "task": "sort"}, {"prompt": "3"}]
    rows += [{"prompt": "4", "task": "maths", "answer": "8"}, {"prompt": "5", "task": "sort"}]
    given = ("data.task=notes", "+tasks={maths: {verifier: numeric}, notes: {verifier: exact}}")
    sets = load_file(tmp_path, rows, *given)
    assert sets.tasks == ["maths", "notes", "sort"]
    assert [(p.task, p.verifier) for p in sets.train] == [("maths", "numeric"), ("sort", "sort"), ("notes", "exact")]
    assert [(p.task, p.verifier) for p in sets.held_out] == [("maths", "numeric"), ("sort", "sort")]


def test_an_answer_is_checked_by_the_verifier_that_its_task_names(tmp_path: Path):
    rows = [{"prompt": "1", "task": "exact", "answer": "seven"}] + [{"prompt": text} for text in "234"]
    load_file(tmp_path, rows)
    words = refusal(lambda: load_file(tmp_path, rows, "+tasks={exact: {verifier: numeric}}"))
    assert words.startswith(f"{tmp_path}/prompts.jsonl, line 1: verifier 'numeric' expects an answer that holds a num")


TEACH_SORT = "+teachers={sort: {path: a}}"


def test_a_task_without_a_teacher_is_refused_whether_it_is_trained_on_or_held_out(tmp_path: Path):
    for unknown in range(4):
        rows = [{"prompt": str(i), "task": "exact" if i == unknown else "sort"} for i in range(4)]
        words = refusal(lambda rows=rows: load_file(tmp_path, rows, TEACH_SORT))
        assert words.startswith("task 'exact' has no teacher: teachers has entries for sort; add teachers.exact")
    load_file(tmp_path, [{"prompt": str(i), "task": "sort"} for i in range(4)], TEACH_SORT)


def test_a_teacher_or_options_for_a_task_that_no_prompt_has_are_refused():
    words = "no prompt has this task; the prompts have sort"
    assert refusal(lambda: load("+teachers={sort: {path: a}, copy: {path: b}}")) == f"teachers.copy: {words}"
    assert refusal(lambda: load("+tasks={copy: {share: 2}}")) == f"tasks.copy: {words}"


def test_fewer_held_out_prompts_of_a_task_than_ranks_are_refused_but_not_none(tmp_path: Path):
    rows = [{"prompt": str(i), "task": task} for i, task in enumerate(["exact", "sort", "exact", "sort", "sort"])]
    words = refusal(lambda: load_file(tmp_path, rows, "eval.num_prompts=4", "learner.num_ranks=2"))
    assert words == (
        "data: 1 held-out prompts have the task 'exact', which is evaluated by itself: expected at least"
        " learner.num_ranks=2 of them, or none"
    )
    sets = load_file(tmp_path, rows, "eval.num_prompts=2", "learner.num_ranks=2")
    assert [prompt.task for prompt in sets.held_out] == ["sort", "sort"]


def test_a_share_too_small_for_any_prompt_of_a_mixed_batch_is_refused():
    given = (*TWO_TASKS, "data.num_prompts=20", "batch.num_prompts=4", "+tasks={copy: {share: 0.1}}")
    words = refusal(lambda: load(*given))
    assert words.startswith("tasks.copy.share=0.1: none of batch.num_prompts=4 prompts would be of this task")
    assert "batch.mode=sequential" in words
    load(*given, "batch.mode=sequential")
    load(*given, "batch.num_prompts=16")


def test_the_demo_of_two_teachers_has_room_for_the_prompts_of_both_tasks():
    config = compose_config("experiment=demo_multi", "data.num_prompts=20")
    sets = load_prompts(config, tokenizer=build_tokenizer())
    assert Counter(p.task for p in sets.held_out) == {"sort": 128, "copy": 128}
