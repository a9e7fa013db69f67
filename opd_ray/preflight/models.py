"""Whether student and teachers speak of the same tokens, in the same length: checks on their files alone."""

from collections.abc import Sequence

from opd_ray.config.objective import ObjectiveKind
from opd_ray.config.schema import Config
from opd_ray.config.teacher import TeacherKind
from opd_ray.config.validate import validate_vocabulary
from opd_ray.preflight.facts import ModelFacts
from opd_ray.preflight.finding import Finding, error, ok, warning
from opd_ray.routing import max_response_tokens, teachers_of


def special_tokens(student: ModelFacts, teachers: Sequence[ModelFacts]) -> Finding:
    """Compare what begins, pads and separates; end tokens have a check of their own."""
    roles = sorted({role for m in (student, *teachers) for role in m.special_tokens} - {"eos_token"})
    differing = [
        f"{role} is {student.special_tokens.get(role)} to student.path and {t.special_tokens.get(role)} to {t.key}"
        for t in teachers
        for role in roles
        if student.special_tokens.get(role) != t.special_tokens.get(role)
    ]
    if not differing:
        return ok("special tokens", f"the same ({', '.join(roles) or 'none'})")
    return warning(
        "special tokens",
        "; ".join(differing),
        "prompts are tokenised by the student alone; if the teacher knows other separators, use the teacher's tokenizer"
        " files for the student as well",
    )


def end_tokens(student: ModelFacts, teachers: Sequence[ModelFacts], *, equivalent: Sequence[Sequence[str]]) -> Finding:
    """Compare the tokens that end a response; those that objective.equivalent_tokens puts together count as one."""
    class_of = {token: tokens[0] for tokens in equivalent for token in tokens}

    def classes(model: ModelFacts) -> set[str]:
        return {class_of.get(token, token) for token in model.end_tokens}

    def words(model: ModelFacts) -> str:
        return " or ".join(sorted(model.end_tokens)) or "nothing"

    differing = [teacher for teacher in teachers if classes(teacher) != classes(student)]
    if not differing:
        return ok("end tokens", f"responses end with {words(student)}")
    union = sorted(student.end_tokens.union(*(t.end_tokens for t in differing)))
    listed = ",".join(f'"{token}"' for token in union)
    return warning(
        "end tokens",
        f"student.path ends with {words(student)}, " + ", ".join(f"{t.key} with {words(t)}" for t in differing),
        f"count them as one: 'objective.equivalent_tokens=[[{listed}]]'",
    )


def chat_templates(student: ModelFacts, teachers: Sequence[ModelFacts]) -> Finding:
    """Compare the templates: the teacher reads prompts in the student's form."""
    differing = [teacher for teacher in teachers if teacher.chat_template != student.chat_template]
    if not differing:
        return ok("chat template", "the same" if student.chat_template else "none")
    have = {True: "has a template of its own", False: "has none"}
    said = "; ".join(f"{t.key} {have[t.chat_template is not None]}" for t in differing)
    return warning(
        "chat template",
        f"student.path {have[student.chat_template is not None]}; {said}",
        "the teacher scores prompts in the student's template; give the student the template the teacher was trained"
        " with (chat_template.jinja in its folder), unless prompts are plain text",
    )


def vocabulary(student: ModelFacts, teachers: Sequence[ModelFacts]) -> Finding:
    """Compare the heads' rows with each other and with the token map."""
    models = (student, *teachers)
    common = min(model.num_rows for model in models)
    num_tokens = max(model.num_tokens for model in models)
    rows = ", ".join(f"{model.key} {model.num_rows:,}" for model in models)
    found = f"rows of the heads: {rows}; common range {common:,}, {num_tokens:,} tokens"
    if num_tokens <= common:
        return ok("vocabulary", found)
    return warning(
        "vocabulary",
        f"{found}; ids {common:,} to {num_tokens - 1:,} lie beyond it",
        "those tokens get no signal; expected heads with a row for every token of the map, or prompts and responses"
        " that never use them",
    )


def top_k(config: Config, *, vocab_size: int) -> Finding:
    """Compare objective.top_k with the vocabulary and with the log-probs that the rollout engine gives."""
    try:
        validate_vocabulary(config, vocab_size=vocab_size)
    except ValueError as refusal:
        return error("top-k", str(refusal), "lower objective.top_k")
    if config.objective.kind is not ObjectiveKind.support:
        return ok("top-k", f"not used by objective={config.objective.kind.value}")
    limit = config.rollout.engine_args.get("max_logprobs")
    engine = f"; rollout.engine_args.max_logprobs={limit}" if limit is not None else ""
    return ok("top-k", f"{config.objective.top_k} of {vocab_size:,} tokens{engine}")


def context(config: Config, student: ModelFacts, teachers: Sequence[ModelFacts]) -> Finding:
    """Compare the longest sequence with each model's positions."""
    longest = config.data.max_prompt_tokens + max_response_tokens(config)
    found = (
        f"longest sequence {longest:,} tokens (data.max_prompt_tokens={config.data.max_prompt_tokens} +"
        f" {max_response_tokens(config)} of the response)"
    )
    known = {m.key: m.max_positions for m in (student, *teachers) if m.max_positions is not None}
    short = {key: positions for key, positions in known.items() if positions < longest}
    limits = ", ".join(f"{key} {positions:,}" for key, positions in (short or known).items()) or "not named"
    if not short:
        return ok("context", f"{found}; max_position_embeddings: {limits}")
    engine_args = [config.rollout.engine_args, *(t.engine_args for t in teachers_of(config).by_name.values())]
    may_lengthen = any("hf_overrides" in arguments for arguments in engine_args)
    return (warning if may_lengthen else error)(
        "context",
        f"{found}, more than max_position_embeddings: {limits}",
        "lower data.max_prompt_tokens or rollout.max_response_tokens (tasks.*.max_response_tokens)",
    )


def own_teachers(config: Config) -> Finding:
    """Look for a teacher that is the student and knows no more than it: it agrees with the student from the start."""
    teachers = [config.teacher] if not config.teachers else list(config.teachers.values())
    if not any(teacher.kind is TeacherKind.self for teacher in teachers):
        return ok("self-distillation", "no teacher is the student itself")
    if all(t.context is not None for t in teachers if t.kind is TeacherKind.self):
        return ok("self-distillation", "teacher.context tells the student as teacher what the student is not told")
    return warning(
        "self-distillation",
        "teacher.kind=self without teacher.context: the teacher is the student and reads the same, so that the first"
        " update has nothing to learn",
        "give teacher.context, a template with {prompt} and perhaps {answer}, unless this is a test",
    )
