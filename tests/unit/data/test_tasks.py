import time

import pytest

from opd_ray.data.tasks import TASKS, VERIFIERS, CopyTask, SortTask, Task, verifier


def test_an_example_asks_for_twelve_digits_and_answers_them_sorted():
    (example,) = SortTask().examples(num_examples=1, seed=3)
    digits = example.prompt.removesuffix("=").split("+")
    assert len(digits) == 12
    assert all(digit in "0123456789" and len(digit) == 1 for digit in digits)
    assert example.answer == "".join(sorted(digits))


def test_an_example_asks_for_twelve_digits_by_a_double_sign_and_answers_them_as_they_come():
    (example,) = CopyTask().examples(num_examples=1, seed=3)
    assert example.prompt.endswith("==")
    digits = example.prompt.removesuffix("==").split("+")
    assert len(digits) == 12
    assert all(digit in "0123456789" and len(digit) == 1 for digit in digits)
    assert example.answer == "".join(digits)


def test_no_prompt_of_one_task_is_one_of_another():
    sort, copy = ({e.prompt for e in task.examples(num_examples=200, seed=1)} for task in (SortTask(), CopyTask()))
    assert not sort & copy


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_same_seed_gives_the_same_stream_and_a_longer_one_only_adds(task: Task):
    assert task.examples(num_examples=50, seed=7)[:20] == task.examples(num_examples=20, seed=7)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_different_seeds_give_different_streams(task: Task):
    prompts = [{example.prompt for example in task.examples(num_examples=200, seed=seed)} for seed in range(3)]
    assert not prompts[0] & prompts[1]
    assert not prompts[1] & prompts[2]


def test_twenty_thousand_examples_take_less_than_a_second():
    start_s = time.perf_counter()
    SortTask().examples(num_examples=20_000, seed=0)
    assert time.perf_counter() - start_s < 1.0


def test_every_task_marks_its_own_answers_as_right():
    for task in TASKS.values():
        for example in task.examples(num_examples=20, seed=1):
            assert task.verify(example.answer, answer=example.answer) == 1.0


@pytest.mark.parametrize(
    ("response", "mark"),
    [("112", 1.0), (" 1 1\t2\n", 1.0), ("121", 0.0), ("1122", 0.0), ("11", 0.0), ("", 0.0)],
)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_built_in_tasks_compare_responses_without_white_space(task: Task, response: str, mark: float):
    assert task.verify(response, answer="112") == mark


@pytest.mark.parametrize(
    ("response", "answer", "mark"),
    [
        ("so 3 + 4 makes 7.", "7", 1.0),
        ("#### 1,234", "the answer is 1234", 1.0),
        ("it is 2.50", "2.5", 1.0),
        ("it is -3", "3", 0.0),
        ("from 1-3", "3", 1.0),
        ("0.5", ".5", 1.0),
        ("7 or 8", "7", 0.0),
        ("no idea", "7", 0.0),
    ],
)
def test_numeric_compares_the_last_numbers(response: str, answer: str, mark: float):
    assert VERIFIERS["numeric"](response, answer) == mark


def test_numeric_refuses_an_answer_without_a_number():
    with pytest.raises(ValueError, match="holds a number"):
        VERIFIERS["numeric"]("7", "seven")


def test_exact_ignores_white_space_at_the_ends_only():
    assert VERIFIERS["exact"](" a b\n", "a b") == 1.0
    assert VERIFIERS["exact"]("ab", "a b") == 0.0


def test_a_verifier_is_found_by_task_name_or_by_its_own():
    assert verifier("sort")("1 2", "12") == verifier("copy")("1 2", "12") == 1.0
    assert verifier("exact") is VERIFIERS["exact"]


def test_an_unknown_verifier_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'sorted': expected one of sort, copy, exact, numeric"):
        verifier("sorted")
