import json
from pathlib import Path
from typing import Any

import pytest
from config_files import compose_config, refusal
from transformers import PreTrainedTokenizerFast, Qwen3Config

from opd_ray.config.schema import Config
from opd_ray.data.prompts import PromptSets, load_prompts
from opd_ray.data.teacher_context import check_teacher_room, longest_teacher_prompts, with_room
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.protocol import Prompt

TEMPLATE = "{% for m in messages %}{{ m['content'] }}+{% endfor %}{% if add_generation_prompt %}={% endif %}"
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "task": "numeric"} for i in range(5)]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def compose(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Config:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return compose_config(
        "name=run",
        "num_steps=1",
        f"student.path={folder}",
        "teacher=self",
        "data=jsonl",
        f"data.path={path}",
        "data.max_prompt_tokens=12",
        "eval.num_prompts=2",
        "rollout.max_response_tokens=8",
        *overrides,
    )


def load(folder: Path, rows: list[dict[str, Any]], *overrides: str, template: str | None = None) -> PromptSets:
    return load_prompts(compose(folder, rows, *overrides), tokenizer=tokenizer_with(template))


def both(prompt: Prompt) -> tuple[str, str]:
    """Return what the student reads and what the teacher reads instead."""
    tokenizer = build_tokenizer()
    return tokenizer.decode(prompt.ids_P), tokenizer.decode(prompt.teacher_ids_P)


def test_the_teacher_reads_the_template_and_the_student_the_prompt_of_training_and_held_out_sets(tmp_path: Path):
    sets = load(tmp_path, ROWS, "teacher.context='{answer}++{prompt}'")
    assert [both(p) for p in sets.train] == [(f"{i}+{i}=", f"{2 * i}++{i}+{i}=") for i in range(3)]
    assert [both(p) for p in sets.held_out] == [(f"{i}+{i}=", f"{2 * i}++{i}+{i}=") for i in (3, 4)]


def test_without_a_context_the_teacher_has_no_prompt_of_its_own(tmp_path: Path):
    assert [len(p.teacher_ids_P) for p in load(tmp_path, ROWS).train] == [0, 0, 0]


def test_braces_in_prompts_and_answers_are_text(tmp_path: Path):
    def refused() -> None:
        rows = [{"prompt": f"{i}=", "answer": "{prompt}"} for i in range(5)]
        load(tmp_path, rows, "teacher.context='{answer}{prompt}'")

    message = refusal(refused)  # the tiny tokenizer knows no braces: they have come through as they were
    assert message.startswith(f"{tmp_path}/prompts.jsonl, line 1, in teacher.context: ")
    assert "cannot encode" in message


def test_in_a_chat_the_last_user_message_is_what_the_template_makes_of_it(tmp_path: Path):
    messages = [
        {"role": "system", "content": "1"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4"},
        {"role": "assistant", "content": "5"},
    ]
    rows = [{"messages": [*messages, {"role": "tool", "content": str(i)}], "answer": "9"} for i in range(3)]
    more = ("teacher.context='{answer}{prompt}{prompt}'", "data.max_prompt_tokens=16")
    (prompt,) = load(tmp_path, rows, *more, template=TEMPLATE).train
    assert both(prompt) == ("1+2+3+4+5+0+=", "1+2+3+944+5+0+=")


def test_a_context_that_is_the_prompt_gives_the_same_tokens(tmp_path: Path):
    for rows in (ROWS, [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(5)]):
        for prompt in load(tmp_path, rows, "teacher.context='{prompt}'", template=TEMPLATE).train:
            assert prompt.teacher_ids_P.tolist() == prompt.ids_P.tolist()


def test_a_prompt_without_the_answer_that_the_teacher_is_shown_is_named_and_counted(tmp_path: Path):
    rows = [*ROWS[:1], {"prompt": "7="}, {"prompt": "8="}, *ROWS[1:]]
    message = refusal(lambda: load(tmp_path, rows, "teacher.context='{answer}{prompt}'"))
    assert message.startswith(f"{tmp_path}/prompts.jsonl, line 2: teacher.context shows the teacher {{answer}}")
    assert "2 of 5 prompts" in message
    assert len(load(tmp_path, rows, "teacher.context='1+{prompt}'").train) == 5


def test_each_task_has_the_context_of_its_own_teacher(tmp_path: Path):
    tasks = ("numeric", "exact", "sort")
    rows = [{"prompt": f"{i}=", "answer": "9", "task": tasks[i % 3]} for i in range(6)]
    teachers = (
        "{numeric: {kind: self, context: '1{prompt}'}, exact: {kind: self, context: '{answer}+{prompt}'},"
        " sort: {kind: self}}"
    )
    config = compose(tmp_path, rows, f"+teachers={teachers}", "eval.num_prompts=3", "batch.num_prompts=3")
    sets = load_prompts(config, tokenizer=build_tokenizer())
    assert [both(p)[1] for p in sets.train] == ["10=", "9+1=", ""]
    assert longest_teacher_prompts(config, sets.train) == {"numeric": 12}  # contexts apart, they are one teacher


def _positions(folder: Path, number: int) -> None:
    Qwen3Config(max_position_embeddings=number).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").touch()


def test_the_teachers_room_grows_with_its_longest_prompt_and_is_checked_against_its_positions(tmp_path: Path):
    config = compose(tmp_path, ROWS, "teacher.context='1+2+3+4+5+6+7+{answer}+{prompt}'")
    sets = load_prompts(config, tokenizer=build_tokenizer())
    longest = longest_teacher_prompts(config, [*sets.train, *sets.held_out])
    assert longest == {"teacher": 14 + 2 + 4}
    assert with_room(config, [p.teacher_ids_P for p in sets.train]).data.max_prompt_tokens == 14 + 2 + 4
    _positions(tmp_path, 28)
    check_teacher_room(config, longest)
    _positions(tmp_path, 27)
    message = refusal(lambda: check_teacher_room(config, longest))
    assert message.startswith(
        "teacher.context makes prompts of up to 20 tokens, with 8 of the response 28: expected at"
    )
    check_teacher_room(config, {"teacher": 12})  # no longer than the student's own: another check's business


@pytest.mark.parametrize("context", ["{prompt}", "1{prompt}"])
def test_short_contexts_leave_the_room_at_that_of_the_longest_allowed_prompt(tmp_path: Path, context: str):
    config = compose(tmp_path, ROWS, f"teacher.context='{context}'")
    sets = load_prompts(config, tokenizer=build_tokenizer())
    assert longest_teacher_prompts(config, sets.train) == {"teacher": 12}
    assert with_room(config, [p.teacher_ids_P for p in sets.train]) == config
