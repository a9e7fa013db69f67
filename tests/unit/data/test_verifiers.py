"""How responses are marked: options, mathematics in a process that can be killed, reasoning-gym's own rules."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_files import compose_config, refusal

from opd_ray.data import math_child
from opd_ray.data.marking_process import MarkingProcess
from opd_ray.data.math_answers import verify_math
from opd_ray.data.prompts import load_prompts
from opd_ray.data.reasoning import reasoning_records, verify_reasoning
from opd_ray.data.reasoning_entries import as_text, from_text, stated_answer
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
        ("**Answer:** B", "B", 1.0),
        ("ANSWER: $B$.", "B", 1.0),
        ("The answer is option B", "B", 1.0),
        (r"\boxed{\textbf{(B)}}", "B", 1.0),
        ("(A) is close, (C) is not.\n\nB", "B", 1.0),
        ("answer: A is what comes to mind, but\n**(B)**\n", "B", 1.0),
        ("Answer: I think it is (B)", "B", 1.0),
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
def math() -> Iterator[MarkingProcess]:
    process = MarkingProcess("opd_ray.data.math_child", deadline_s=4.0)
    yield process
    process.close()


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
def test_expressions_are_compared_as_mathematics(math: MarkingProcess, response: str, answer: str, reward: float):
    assert math.mark(response, answer) == reward


def test_an_expression_that_takes_for_ever_costs_its_own_sample_alone(math: MarkingProcess):
    assert math.mark(r"\boxed{1}", "1") == 1.0
    start = time.monotonic()
    assert math.mark(r"\boxed{9^{9^{9^{9}}}}", "3^{3^{3^{3^{3}}}}+1") == 0.0
    assert 4.0 <= time.monotonic() - start < 12.0
    assert math.mark(r"\boxed{1}", "1") == 1.0


def test_a_process_that_dies_is_replaced(math: MarkingProcess):
    assert math.mark("1", "1") == 1.0
    math._child.kill()
    assert [math.mark("1", "1") for _ in range(2)][-1] == 1.0


def test_threads_get_the_answers_to_their_own_questions(math: MarkingProcess):
    rewards: dict[int, float] = {}

    def ask(i: int) -> None:
        rewards[i] = math.mark(f"\\boxed{{{i}}}", str(i - i % 2))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {i: float(i % 2 == 0) for i in range(16)}


def test_the_process_ends_when_its_questions_do(math: MarkingProcess):
    assert math.mark("1", "1") == 1.0
    child = math._child
    child.stdin.close()
    assert child.wait(timeout=10) == 0
    assert math.mark("1", "1") == 1.0


def test_the_process_loads_neither_torch_nor_a_worker():
    loaded = (
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in {'torch', 'numpy', 'ray', 'opd_ray', 'vllm'}))"
    )
    program = f"import sys; sys.argv = ['x', '1']; import {math_child.__name__}; {loaded}"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert eval(told) == ["opd_ray", "opd_ray.data", "opd_ray.data.marking_child", "opd_ray.data.math_child"]


def test_the_process_ends_by_itself_when_the_one_who_asks_is_killed():
    program = """
import os, sys, threading, time
from opd_ray.data.marking_process import MarkingProcess
process = MarkingProcess("opd_ray.data.math_child", deadline_s=1.0)
process.mark("1", "1")
print(process._child.pid, flush=True)
threading.Thread(target=process.mark, args=(r"\\boxed{9^{9^{9^{9}}}}", "3^{3^{3^{3^{3}}}}+1")).start()
time.sleep(60)
"""
    asker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(asker.stdout.readline())
    time.sleep(0.5)
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    deadline = time.monotonic() + 40  # 1 s, and 10 s more of the alarm
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_library_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "loud_child.py").write_text(
        "import os\nfrom opd_ray.data.marking_child import serve\n"
        "def is_right(response, answer):\n    print('true')\n    os.write(1, b'true')\n    return False\n"
        "serve(is_right)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    process = MarkingProcess("loud_child")
    assert [process.mark("x", "x") for _ in range(2)] == [0.0, 0.0]
    process.close()


def test_an_empty_answer_is_refused():
    assert "expects an expression" in refusal(lambda: verify_math("1", "  "))


@pytest.fixture(scope="module")
def reasoning() -> Iterator[MarkingProcess]:
    process = MarkingProcess("opd_ray.data.reasoning_child", deadline_s=4.0)
    yield process
    process.close()


def test_a_rule_that_evaluates_a_response_for_ever_costs_this_response(reasoning: MarkingProcess):
    (record,) = reasoning_records("countdown", num_records=1, seed=1)
    own = json.loads(record.reference)["entry"]["metadata"]["expression"]
    assert reasoning.mark(f"Answer: {own}", record.reference) == 1.0
    start = time.monotonic()
    assert reasoning.mark("Answer: 9**9**9**9", record.reference) == 0.0
    assert 4.0 <= time.monotonic() - start < 12.0
    assert reasoning.mark(f"Answer: {own}", record.reference) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {path}')",
        "__import__('subprocess').run(['touch', '{path}'])",
        "open('{path}', 'w')",
        "__import__('pathlib').Path('{path}').write_text('x')",
    ],
)
def test_a_response_that_a_rule_evaluates_changes_nothing(reasoning: MarkingProcess, tmp_path: Path, code: str):
    (record,) = reasoning_records("countdown", num_records=1, seed=1)
    path = tmp_path / "made"
    assert reasoning.mark("Answer: " + code.format(path=path), record.reference) == 0.0
    assert not path.exists()


@pytest.mark.parametrize("name", ["prime_factorization", "game_of_life"])
def test_a_rule_that_raises_costs_this_response(name: str):
    (record,) = reasoning_records(name, num_records=1, seed=5)
    assert verify_reasoning('Answer: {"a": 1}', record.reference) == 0.0
    assert verify_reasoning(f"Answer: {record.answer}", record.reference) == 1.0


@pytest.mark.parametrize("name", ["arc_agi", "rearc", "sudoku", "rotate_matrix"])
def test_an_answer_of_several_lines_is_read_whole_and_entries_keep_their_tuples(name: str):
    (record,) = reasoning_records(name, num_records=1, seed=5)
    assert len(record.answer.splitlines()) > 1
    assert verify_reasoning(f"I see.\nAnswer:\n{record.answer}\nThat is all.", record.reference) == 1.0
    assert verify_reasoning(f"I see.\n{record.answer}", record.reference) == 1.0


@pytest.mark.parametrize("value", [(1, 2), [(1,), [2.5, None]], {1: "a", (2, 3): {"b": True}}, {"tuple of": 1}, "x"])
def test_text_gives_the_value_back_with_its_types(value: object):
    back = from_text(as_text(value))
    assert back == value
    assert repr(back) == repr(value)


def test_a_value_that_json_does_not_have_is_refused_by_its_type():
    assert refusal(lambda: as_text({"a": [b"x"]})) == "they hold a bytes, which JSON does not have"
    assert "not the same" in refusal(lambda: as_text(float("nan")))


def test_a_dataset_that_needs_more_than_a_seed_is_refused_by_name():
    assert refusal(lambda: reasoning_records("composite", num_records=1, seed=1)).startswith(
        "reasoning-gym's composite cannot be used: it is not made from a seed alone"
    )


@pytest.mark.parametrize("reference", ["5", "text", "{}", '{"dataset": "gcd"}', "[]"])
def test_an_answer_that_is_no_entry_is_refused(reference: str):
    assert "expects an entry as data=reasoning_gym makes them" in refusal(lambda: verify_reasoning("5", reference))


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
        ("**Answer:** 4", "4"),
        ("**Answer: 4**", "4"),
        ("**ANSWER**: 4\nI hope that this helps.", "4"),
        ("Answer: 4\nAnswer:", "4"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("one\n\n  two \n", "two"),
        ("", ""),
    ],
)
def test_the_answer_of_a_response_is_what_it_states_last(response: str, answer: str):
    assert stated_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "num_lines", "answer"),
    [
        ("Answer:\n1 2\n3 4\nDone.", 2, "1 2\n3 4"),
        ("So:\n1 2\n3 4\n", 2, "1 2\n3 4"),
        ("Answer: {\n}\n", None, "{\n}"),
        ("<answer>1\n2\n3</answer>", 1, "1\n2\n3"),
    ],
)
def test_an_answer_has_as_many_lines_as_it_should(response: str, num_lines: int | None, answer: str):
    assert stated_answer(response, num_lines=num_lines) == answer


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
