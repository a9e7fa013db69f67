from typing import Any

import pytest
import torch

from opd_ray.config.schema import Dtype
from opd_ray.config.weight_sync import WeightSync
from workers.sync.choose import ENGINES, PUBLISHERS, SyncPlan, open_publisher
from workers.sync.source import StudentWeights
from workers.weights import read_tensors


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4, bias=False))
    return layers.to(dtype)


def weights(student: torch.nn.Module, dtype: torch.dtype = torch.float32) -> StudentWeights:
    return StudentWeights(student, dtype=dtype, partitioned=False, reads=True)


def publisher(student: torch.nn.Module, *, dtype: Dtype = Dtype.float32, rank: int = 0) -> Any:
    plan = SyncPlan(way=WeightSync.object_store, dtype=dtype, ranks_per_worker=1)
    return open_publisher(student, plan=plan, rank=rank, partitioned=False, num_updates=lambda: 0)


def test_every_way_but_auto_has_a_publisher_and_every_way_an_engine():
    assert set(PUBLISHERS) == set(WeightSync) - {WeightSync.auto}
    assert set(ENGINES) == set(WeightSync)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("travelling", [torch.float32, torch.bfloat16])
def test_what_is_announced_is_what_comes(dtype: torch.dtype, travelling: torch.dtype):
    source = weights(model(dtype), travelling)
    for _ in range(2):  # each pass is a fresh one
        announced = [(name, t.dtype, tuple(t.shape)) for name, t in source]
        assert announced == source.shapes()


def test_parameters_that_need_no_rounding_are_published_from_where_they_lie():
    student = model()
    manifest, buffers = publisher(student).publish(3)
    assert manifest.version == 3
    addresses = [parameter.data_ptr() for parameter in student.parameters()]
    assert [buffer.ctypes.data for buffer in buffers] == addresses


def test_rounded_parameters_take_half_the_bytes_and_are_the_nearest_in_the_smaller_type():
    student = model()
    whole, _ = publisher(student).publish(0)
    manifest, buffers = publisher(student, dtype=Dtype.bfloat16).publish(0)
    assert 2 * manifest.num_bytes == whole.num_bytes
    for (name, tensor), parameter in zip(read_tensors(buffers, manifest), student.parameters(), strict=True):
        torch.testing.assert_close(tensor, parameter.detach().bfloat16(), atol=0, rtol=0, msg=name)


def test_smaller_parameters_are_not_blown_up():
    manifest, _ = publisher(model(torch.bfloat16)).publish(0)
    assert {entry.dtype for entry in manifest.entries} == {"bfloat16"}


def test_ranks_beside_the_first_publish_nothing():
    assert publisher(model(), rank=1).publish(0) == (None, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_never_published(value: float, dtype: torch.dtype):
    student = model(dtype)
    with torch.no_grad():
        student[1].bias[3] = value
    with pytest.raises(ValueError, match=r"not finite, the first in 1\.bias: they are not published"):
        publisher(student).publish(1)


def test_weights_that_are_finite_but_overflow_in_the_type_they_travel_in_are_not_published_either():
    student = model()
    with torch.no_grad():
        student[0].weight[0, 0] = 3.4e38  # rounds to infinity in bfloat16
    publisher(student).publish(1)
    with pytest.raises(ValueError, match=r"the first in 0\.weight"):
        publisher(student, dtype=Dtype.bfloat16).publish(1)
