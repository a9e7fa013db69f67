"""Privileged context: what a teacher reads where the student reads the prompt alone.

The tokens are made in the driver, the way the prompt's own are; a teacher's responses are scored behind them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from opd_ray.config.schema import Config
from opd_ray.config.teacher import TeacherKind, shows_answer
from opd_ray.data.models import open_model
from opd_ray.data.records import Record
from opd_ray.protocol import Int32, Prompt
from opd_ray.routing import Teachers, max_response_tokens, teacher_key, teachers_of


def shown_to_teacher(records: Sequence[Record], contexts: Sequence[str | None]) -> list[Record]:
    """Return the records that have a context, with the prompt or the last user message as its template says.

    Raises ValueError when a template shows an answer and a record has none.
    """
    pairs = [(record, context) for record, context in zip(records, contexts, strict=True) if context is not None]
    missing = [record for record, context in pairs if shows_answer(context) and record.answer is None]
    if missing:
        raise ValueError(
            f"{missing[0].where}: teacher.context shows the teacher {{answer}}, and this prompt has none"
            f" ({len(missing)} of {len(pairs)} prompts have no `answer`); add them, or leave {{answer}} out"
        )
    return [_shown(record, context) for record, context in pairs]


def longest_teacher_prompts(config: Config, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Return by teacher's name the tokens of the longest prompt it must take: at least data.max_prompt_tokens."""
    teachers = teachers_of(config)
    longest = Counter(dict.fromkeys(teachers.by_name, config.data.max_prompt_tokens))
    for prompt in prompts:
        name = teachers.name_of(prompt.task)
        longest[name] = max(longest[name], len(prompt.teacher_ids_P))
    return dict(longest)


def with_room(config: Config, teacher_prompts: Sequence[Int32]) -> Config:
    """Return the configuration of an engine that takes the teachers' own prompts as well."""
    longest = max([config.data.max_prompt_tokens, *map(len, teacher_prompts)])
    return replace(config, data=replace(config.data, max_prompt_tokens=longest))


def check_teacher_room(config: Config, longest: Mapping[str, int]) -> None:
    """Raise ValueError when a teacher's longest prompt and a response are more than its model has positions for.

    A teacher behind a server is not looked at: the server knows its limit and is asked at the start.
    """
    teachers = teachers_of(config)
    for name, teacher in teachers.by_name.items():
        has_context = longest[name] > config.data.max_prompt_tokens
        if not has_context or teacher.kind is TeacherKind.http or "hf_overrides" in teacher.engine_args:
            continue
        model = open_model(teacher_key(name), teacher.path).config
        positions = getattr(model, "max_position_embeddings", None)
        needed = longest[name] + max_response_tokens(config)
        if positions is not None and needed > positions:
            raise ValueError(
                f"{_context_key(teachers, name)} makes prompts of up to {longest[name]} tokens, with"
                f" {max_response_tokens(config)} of the response {needed}: expected at most {positions}, the positions"
                f" of {teacher_key(name)}={teacher.path}; shorten the context, or lower rollout.max_response_tokens"
            )


def _context_key(teachers: Teachers, name: str) -> str:
    return " and ".join(f"teachers.{task}.context" for task in teachers.tasks_of(name)) or "teacher.context"


def _shown(record: Record, template: str) -> Record:
    record = replace(record, where=f"{record.where}, in teacher.context")
    if record.messages is None:
        return replace(record, prompt=template.format(prompt=record.prompt, answer=record.answer))
    last = max(index for index, message in enumerate(record.messages) if message["role"] == "user")
    messages = list(record.messages)
    content = template.format(prompt=messages[last]["content"], answer=record.answer)
    messages[last] = {**messages[last], "content": content}
    return replace(record, messages=messages)
