from collections.abc import Callable

import numpy as np
import pytest
import torch

from workers.fingerprint import differences, of_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]


def tensor(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_have_equal_fingerprints_and_one_that_differs_another(dtype: torch.dtype):
    first = of_tensors([("a", tensor(dtype=dtype)), ("b", tensor(seed=1, dtype=dtype))])
    assert differences(first, of_tensors([("b", tensor(seed=1, dtype=dtype)), ("a", tensor(dtype=dtype))])) == []
    bits = tensor(dtype=dtype).view(torch.uint8)
    bits[3, 4] ^= 1
    assert differences(first, of_tensors([("a", bits.view(dtype)), ("b", tensor(seed=1, dtype=dtype))])) == ["a"]


@pytest.mark.parametrize(
    "num_values", [0, 1, 5, 2**22 + 3], ids=["none", "one", "five", "more than are hashed at a time"]
)
def test_the_fingerprint_is_the_sum_of_values_times_odd_numbers_of_their_places(num_values: int):
    values = np.arange(num_values, dtype=np.int64) * 7919 % 251 - 100
    places = np.arange(num_values, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    high = (places.view(np.int64) >> 32).view(np.uint64)
    factors = (places ^ high) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
    expected = int((values.view(np.uint64) * factors).sum(dtype=np.uint64))
    found = of_tensors([("a", torch.from_numpy(values.astype(np.int32)))])
    assert found == {"a": f"int32 ({num_values},) {expected:016x}"}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[torch.tensor([1, 0, 2, 3, 4, 5])],
        lambda t: t.T.contiguous(),
        lambda t: t.reshape(10, 6),
        lambda t: t.double(),
        lambda t: t * (1 + 2**-23),
        lambda t: torch.zeros_like(t),
    ],
    ids=["rows swapped", "transposed", "another shape", "another type", "next number", "zeros"],
)
def test_order_shape_and_type_count(change: Callable[[torch.Tensor], torch.Tensor]):
    assert differences(of_tensors([("a", tensor())]), of_tensors([("a", change(tensor()))])) == ["a"]


def test_the_layout_in_memory_does_not_count():
    transposed = tensor().T.contiguous().T
    assert not transposed.is_contiguous()
    assert of_tensors([("a", transposed)]) == of_tensors([("a", tensor())])


def test_a_tensor_that_only_one_has_is_a_difference():
    both = of_tensors([("a", tensor()), ("b", tensor())])
    only = of_tensors([("a", tensor())])
    assert differences(both, only) == differences(only, both) == ["b"]
