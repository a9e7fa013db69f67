from workers.fleet import in_calls


def test_calls_carry_as_many_groups_as_they_may_in_order():
    assert in_calls(range(7), 3, num_workers=2) == [range(3), range(3, 6), range(6, 7)]


def test_no_worker_is_left_without_a_call_that_another_could_share():
    assert in_calls(range(6), 8, num_workers=3) == [range(2), range(2, 4), range(4, 6)]
    assert in_calls(range(2), 8, num_workers=3) == [range(1), range(1, 2)]


def test_nothing_is_no_call():
    assert in_calls([], 4, num_workers=2) == []
