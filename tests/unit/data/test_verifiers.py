"""How responses are marked: options, mathematics in a process that can be killed, reasoning-gym's own rules."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_files import compose_config, refusal

from opd_ray.data import math_answers
from opd_ray.data.math_answers import MathVerifier
from opd_ray.data.prompts import load_prompts
from opd_ray.data.reasoning import reasoning_records, stated_answer, verify_reasoning
from opd_ray.data.tasks import verifier
from opd_ray.data.tiny_models import build_tokenizer
from opd_ray.data.verifiers import verify_choice


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("B", "B", 1.0),
        ("(B).", "B", 1.0),
        ("**B**", "(B)", 1.0),
        ("Answer: B", "B", 1.0),
        ("The answer is (C), not (B)", "C", 1.0),
        ("It could be (A). No: (B)", "B", 1.0),
        (r"so \boxed{D}", "D", 1.0),
        (r"so \boxed{\text{D}}", "D", 1.0),
        ("answer: A ... no, answer: B", "B", 1.0),
        ("A long story about B", "B", 0.0),
        ("", "B", 0.0),
        ("Answer: Because", "B", 0.0),
        ("(A)", "B", 0.0),
    ],
)
def test_the_option_that_is_stated_last_counts(response: str, answer: str, reward: float):
    assert verify_choice(response, answer) == reward


def test_an_answer_that_is_no_option_is_refused():
    assert "expects an answer that is one capital letter, was given 'Paris'" in refusal(
        lambda: verify_choice("A", "Paris")
    )


@pytest.fixture(scope="module")
def math() -> Iterator[MathVerifier]:
    verify = MathVerifier(deadline_s=2.0)
    yield verify
    verify.close()


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"thus \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"thus $2\sqrt{3}$", r"\sqrt{12}", 1.0),
        ("the answer is 12", "12", 1.0),
        ("the answer is 13", "12", 0.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{\{3, 1\}}", r"\{1, 3\}", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        ("no idea", "12", 0.0),
        ("", "12", 0.0),
        (r"\boxed{\frac{", "12", 0.0),
        ('"quotes"\nand \u2028 lines \\boxed{7}', "7", 1.0),
    ],
)
def test_expressions_are_compared_as_mathematics(math: MathVerifier, response: str, answer: str, reward: float):
    assert math(response, answer) == reward


def test_an_expression_that_takes_for_ever_costs_its_own_sample_alone(math: MathVerifier):
    assert math(r"\boxed{1}", "1") == 1.0
    start = time.monotonic()
    assert math(r"\boxed{9^{9^{9^{9}}}}", "3^{3^{3^{3^{3}}}}+1") == 0.0
    assert 2.0 <= time.monotonic() - start < 4.0
    assert math(r"\boxed{1}", "1") == 1.0


def test_a_process_that_dies_is_replaced(math: MathVerifier):
    assert math("1", "1") == 1.0
    math._child.kill()
    assert [math("1", "1") for _ in range(2)][-1] == 1.0


def test_threads_get_the_answers_to_their_own_questions(math: MathVerifier):
    rewards: dict[int, float] = {}

    def ask(i: int) -> None:
        rewards[i] = math(f"\\boxed{{{i}}}", str(i - i % 2))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {i: float(i % 2 == 0) for i in range(16)}


def test_the_process_ends_when_its_questions_do(math: MathVerifier):
    assert math("1", "1") == 1.0
    child = math._child
    child.stdin.close()
    assert child.wait(timeout=10) == 0
    assert math("1", "1") == 1.0


def test_the_process_loads_neither_torch_nor_a_worker():
    names = Path(math_answers.__file__).with_name("math_child.py").read_text()
    assert [line for line in names.splitlines() if line.startswith(("import", "from"))] == [
        "import json",
        "import sys",
        "from math_verify import parse, verify",
    ]


def test_an_empty_answer_is_refused(math: MathVerifier):
    assert "expects an expression" in refusal(lambda: math("1", "  "))


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "countdown", "letter_counting", "sudoku", "knights_knaves"])
def test_a_datasets_own_answer_is_right_and_another_is_not(name: str):
    for record in reasoning_records(name, num_records=3, seed=5):
        response = f"I think.\n<answer>{record.answer}</answer>"
        if name != "countdown":  # any expression that gives the number is right, and none is given
            assert verify_reasoning(response, record.reference) == 1.0
        assert verify_reasoning("Answer: nothing", record.reference) == 0.0
        assert verify_reasoning("", record.reference) == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("x\nAnswer: 4", "4"),
        ("Answer: 3\nAnswer: 4", "4"),
        ("<answer>a\nb</answer> Answer: 3", "a\nb"),
        (r"Answer: 3, so \boxed{4}", "4"),
        ("one\n\n  two \n", "two"),
        ("", ""),
    ],
)
def test_the_answer_of_a_response_is_what_it_states_last(response: str, answer: str):
    assert stated_answer(response) == answer


def test_records_follow_from_the_seed_and_say_what_they_are():
    first, again, other = (reasoning_records("chain_sum", num_records=4, seed=seed) for seed in (1, 1, 2))
    assert [r.prompt for r in first] == [r.prompt for r in again]
    assert [r.prompt for r in first] != [r.prompt for r in other]
    assert first[0].task == "chain_sum"
    assert json.loads(first[0].reference)["dataset"] == "chain_sum"
    assert json.loads(first[0].reference)["entry"]["answer"] == first[0].answer


def test_a_run_takes_its_prompts_from_a_dataset_as_chat_where_the_tokenizer_has_a_template():
    config = compose_config(
        "experiment=demo", "data=reasoning_gym", "data.task=gcd", "data.num_prompts=8", "eval.num_prompts=4",
        "batch.num_prompts=2", "data.max_prompt_tokens=500",
    )  # fmt: skip
    tokenizer = ByteTokenizer()
    plain = load_prompts(config, tokenizer=tokenizer)
    assert plain.tasks == ["gcd"]
    assert {p.verifier for p in plain.train} == {"reasoning_gym"}
    assert len(plain.held_out) == 4
    prompt = plain.train[0]
    assert bytes(prompt.ids_P.tolist()).decode().endswith("Answer: ...")
    answer = json.loads(prompt.answer)["entry"]["answer"]
    assert verifier(prompt.verifier)(f"Answer: {answer}", prompt.answer) == 1.0
    tokenizer.chat_template = "{{ messages }}"
    chat = load_prompts(config, tokenizer=tokenizer)
    assert bytes(chat.train[0].ids_P.tolist()).decode().startswith("user: ")


def test_an_unknown_dataset_is_told_with_those_near_it():
    words = refusal(lambda: compose_config("experiment=demo", "data=reasoning_gym", "data.task=chainsum"))
    assert words.startswith("data.task=chainsum: expected one of reasoning-gym's")
    assert "chain_sum" in words


def test_the_teachers_context_shows_the_plain_answer():
    config = compose_config(
        "experiment=demo", "data=reasoning_gym", "data.task=gcd", "data.num_prompts=4", "eval.num_prompts=2",
        "batch.num_prompts=2", "data.max_prompt_tokens=500", "teacher.context='{prompt} ({answer})'",
    )  # fmt: skip
    prompt = load_prompts(config, tokenizer=ByteTokenizer()).train[0]
    answer = json.loads(prompt.answer)["entry"]["answer"]
    assert bytes(prompt.teacher_ids_P.tolist()).decode().endswith(f"({answer})")


class ByteTokenizer:
    """One id a byte."""

    chat_template: str | None = None

    def __call__(self, texts: list[str] | str, **_: object) -> dict[str, list]:
        if isinstance(texts, str):
            return {"input_ids": list(texts.encode())}
        return {"input_ids": [list(text.encode()) for text in texts]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> list[int]:
        return list("".join(f"{m['role']}: {m['content']}" for m in messages).encode())


def test_a_tokenizer_that_knows_digits_only_names_the_prompt_that_it_cannot_encode():
    config = compose_config("experiment=demo", "data=reasoning_gym", "data.task=gcd", "data.num_prompts=4")
    words = refusal(lambda: load_prompts(config, tokenizer=build_tokenizer()))
    assert words.startswith("reasoning-gym gcd, prompt 0: ")
