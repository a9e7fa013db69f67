import pytest
import torch

from workers.teacher.wide_rows import GROUP_COLUMNS, log_softmax, padded_size, top_k


def make_rows(num_rows: int, num_groups: int, seed: int = 0) -> torch.Tensor:
    """Return rows of different numbers between -10 and 10, in random order."""
    num_columns = num_groups * GROUP_COLUMNS
    generator = torch.Generator().manual_seed(seed)
    order_NW = torch.rand(num_rows, num_columns, generator=generator).argsort(-1)
    return 20 * order_NW / num_columns - 10


@pytest.mark.parametrize(("num_columns", "expected"), [(1, 32), (32, 32), (33, 64), (151_936, 151_936)])
def test_columns_are_padded_to_whole_groups(num_columns: int, expected: int):
    assert padded_size(num_columns) == expected


@pytest.mark.parametrize("num_rows", [1, 3, 256])
@pytest.mark.parametrize("num_groups", [1, 2, 37, 700])
def test_the_logprobs_are_those_of_the_rows_though_they_are_written_over_them(num_rows: int, num_groups: int):
    rows_NW = make_rows(num_rows, num_groups)
    expected_NW = rows_NW.double().log_softmax(-1)
    logprobs_NW = log_softmax(rows_NW)
    assert logprobs_NW.data_ptr() == rows_NW.data_ptr()
    torch.testing.assert_close(logprobs_NW.double(), expected_NW, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_the_logprobs_neither_overflow_nor_vanish_far_from_zero(shift: float):
    rows_NW = make_rows(5, 40) + shift
    expected_NW = rows_NW.double().log_softmax(-1)
    torch.testing.assert_close(log_softmax(rows_NW).double(), expected_NW, atol=2e-3, rtol=0)


def test_columns_of_minus_infinity_have_no_mass():
    rows_NW = make_rows(256, 700)
    rows_NW[:, :10_000] = -torch.inf
    rows_NW[:, 20_000:] = -torch.inf
    expected_NW = rows_NW.double().log_softmax(-1)
    torch.testing.assert_close(log_softmax(rows_NW).double(), expected_NW, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("num_groups", [1, 2, 37, 300])
@pytest.mark.parametrize("k", [0, 1, 2, 31, 32, 36, 37, 38, 64, 299, 300, 320])
def test_the_largest_numbers_are_found_in_order(num_groups: int, k: int):
    rows_NW = make_rows(9, num_groups, seed=k)
    k = min(k, rows_NW.shape[1])
    columns_NK, values_NK = top_k(rows_NW, k=k)
    expected = rows_NW.topk(k)
    assert torch.equal(values_NK, expected.values)
    assert torch.equal(columns_NK, expected.indices)


def test_all_of_the_largest_numbers_may_lie_in_one_group_or_each_in_its_own():
    rows_NW = make_rows(2, 100)
    rows_NW[0, 64:96] += 1000
    rows_NW[1, ::GROUP_COLUMNS] += 1000
    columns_NK, _ = top_k(rows_NW, k=32)
    assert sorted(columns_NK[0].tolist()) == list(range(64, 96))
    assert set((columns_NK[1] % GROUP_COLUMNS).tolist()) == {0}
    assert torch.equal(columns_NK, rows_NW.topk(32).indices)


@pytest.mark.parametrize("k", [1, 5, 40, 99, 100, 700])
def test_among_equal_numbers_any_are_taken_but_each_once(k: int):
    generator = torch.Generator().manual_seed(k)
    rows_NW = torch.randint(4, (50, 100 * GROUP_COLUMNS), generator=generator).float()
    columns_NK, values_NK = top_k(rows_NW, k=k)
    assert torch.equal(values_NK, rows_NW.topk(k).values)
    assert torch.equal(rows_NW.gather(1, columns_NK), values_NK)
    assert all(len(set(row)) == k for row in columns_NK.tolist())


def test_minus_infinity_is_taken_last():
    rows_NW = torch.full((1, 100 * GROUP_COLUMNS), -torch.inf)
    rows_NW[0, 5::300] = torch.arange(11.0)
    columns_NK, values_NK = top_k(rows_NW, k=11)
    assert values_NK.tolist() == [list(range(10, -1, -1))]
    assert columns_NK.tolist() == [list(range(3005, 0, -300))]


def test_a_nan_shows_in_everything_that_its_row_gives():
    rows_NW = make_rows(2, 100)
    rows_NW[0, 77] = torch.nan
    columns_NK, values_NK = top_k(rows_NW, k=5)
    assert log_softmax(rows_NW).isnan().all(-1).tolist() == [True, False]
    assert columns_NK[0, 0] == 77
    assert values_NK.isnan().sum() == 1
