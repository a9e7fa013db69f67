import json
from pathlib import Path

import numpy as np
from config_files import compose_config, refusal
from fakes import make_prompt
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.data.prompts import PromptSets, ShuffledPrompts, load_prompts
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
