from hypothesis import given
from hypothesis import strategies as st

from opd_ray.schedule import Schedule, derive_seed

INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def schedule(*, num_steps: int = 10, max_staleness: int = 0, eval_every: int = 0, save_every: int = 0) -> Schedule:
    return Schedule(num_steps=num_steps, max_staleness=max_staleness, eval_every=eval_every, save_every=save_every)


def test_without_a_period_only_the_first_and_the_last_step_are_evaluated():
    assert [s for s in range(11) if schedule().is_eval(s)] == [0, 10]


def test_with_a_period_its_multiples_and_the_last_step_are_evaluated():
    assert [s for s in range(11) if schedule(eval_every=4).is_eval(s)] == [0, 4, 8, 10]


def test_without_a_period_no_checkpoint_is_written():
    assert not any(schedule().is_save(s) for s in range(11))


def test_with_a_period_its_multiples_and_the_last_step_are_saved():
    assert [s for s in range(1, 11) if schedule(save_every=3).is_save(s)] == [3, 6, 9, 10]


def test_a_derived_seed_is_the_same_on_every_machine():
    assert derive_seed(0) == 1447202968
    assert derive_seed(1, 2, 3) == 386933979


@given(st.lists(INT64, min_size=1, max_size=5))
def test_a_derived_seed_is_a_non_negative_31_bit_number_and_a_function_of_its_parts(parts: list[int]):
    assert 0 <= derive_seed(*parts) < 2**31
    assert derive_seed(*parts) == derive_seed(*parts)


@given(INT64, INT64)
def test_the_order_of_the_parts_matters(a: int, b: int):
    assert (derive_seed(a, b) == derive_seed(b, a)) == (a == b)


def test_neighbouring_parts_give_seeds_without_collisions():
    seeds = {derive_seed(0, step, prompt) for step in range(100) for prompt in range(50)}
    assert len(seeds) == 5000
