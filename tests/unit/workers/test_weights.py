from collections.abc import Callable

import numpy as np
import pytest
import torch

from workers.weights import Buffers, WeightManifest, as_bytes, check_publication, plan_manifest, published, read_tensors

TENSORS = {
    "one": torch.randn(1),
    "odd": torch.randn(3, 7),
    "scalar": torch.tensor(2.5),
    "bits": torch.randn(5, 13).to(torch.bfloat16),
    "half": torch.randn(11).to(torch.float16),
    "whole": torch.randn(4, 16),
    "empty": torch.empty(0, 4),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def publish(version: int = 3) -> tuple[WeightManifest, Buffers]:
    return published(TENSORS.items(), version=version)


def test_every_tensor_comes_back_bit_for_bit_whatever_its_type_and_size():
    manifest, buffers = publish()
    read = dict(read_tensors(buffers, manifest))
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_a_manifest_carries_its_version_the_names_of_its_types_and_the_sizes():
    manifest, _ = publish(version=9)
    assert manifest.version == 9
    assert {entry.dtype for entry in manifest.entries} == {"float32", "bfloat16", "float16"}
    assert [entry.num_bytes for entry in manifest.entries] == [t.numel() * t.element_size() for t in TENSORS.values()]
    assert manifest.num_bytes == sum(entry.num_bytes for entry in manifest.entries)


def test_a_planned_manifest_is_the_published_one():
    assert plan_manifest(((n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()), version=3) == publish()[0]


def test_a_publication_shares_the_memory_of_its_tensors():
    _, buffers = publish()
    for tensor, buffer in zip(TENSORS.values(), buffers, strict=True):
        assert not buffer.nbytes or buffer.ctypes.data == tensor.data_ptr()


@pytest.mark.filterwarnings("error")
def test_read_only_buffers_as_the_object_store_gives_them_are_read_without_a_copy_or_a_warning():
    manifest, buffers = publish()
    for buffer in buffers:
        buffer.flags.writeable = False
    for buffer, (name, tensor) in zip(buffers, read_tensors(buffers, manifest), strict=True):
        assert torch.equal(tensor, TENSORS[name])
        assert not buffer.nbytes or tensor.data_ptr() == buffer.ctypes.data


@pytest.mark.parametrize("cut", [lambda p: p.T, lambda p: p[:, 1], lambda p: p[::2]])
def test_a_strided_view_of_a_parameter_is_published_as_its_values(cut: Callable[[torch.Tensor], torch.Tensor]):
    view = cut(torch.nn.Parameter(torch.randn(6, 4)))
    manifest, buffers = published([("view", view)], version=0)
    ((_, read),) = read_tensors(buffers, manifest)
    assert torch.equal(read, view)


def test_a_publication_of_nothing_is_empty():
    manifest, buffers = published([], version=0)
    assert manifest.num_bytes == 0
    assert list(read_tensors(buffers, manifest)) == []


@pytest.mark.parametrize("num_bytes", [0, 83, 85, 168])
def test_a_buffer_of_another_size_than_the_manifest_says_is_refused_by_name(num_bytes: int):
    manifest, buffers = publish()
    damaged = (buffers[0], np.zeros(num_bytes, dtype=np.uint8), *buffers[2:])
    with pytest.raises(ValueError, match=rf"odd holds {num_bytes} bytes, not 84"):
        check_publication(manifest, damaged, shapes=SHAPES)


def test_fewer_buffers_than_the_manifest_says_are_refused():
    manifest, buffers = publish()
    with pytest.raises(ValueError, match="6 weight buffers, their manifest says 7"):
        check_publication(manifest, buffers[1:], shapes=SHAPES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"more": (2,)}, "version 3 lacks 1 tensors: more"),
        ({"odd": (7, 3)}, r"version 3: odd has shape \(3, 7\), the model's has \(7, 3\)"),
    ],
)
def test_a_publication_of_another_model_is_refused(changed: dict[str, tuple[int, ...]], message: str):
    manifest, buffers = publish()
    with pytest.raises(ValueError, match=message):
        check_publication(manifest, buffers, shapes=SHAPES | changed)


def test_a_tensor_that_the_model_does_not_know_is_refused_with_and_without_bytes():
    manifest, buffers = publish()
    known = {name: shape for name, shape in SHAPES.items() if name != "half"}
    for given in (buffers, None):
        with pytest.raises(ValueError, match="version 3 has, unknown to the model, 1 tensors: half"):
            check_publication(manifest, given, shapes=known)
    check_publication(manifest, None, shapes=SHAPES)


def test_the_bytes_of_a_tensor_are_those_in_memory():
    assert as_bytes(torch.tensor([1, 256], dtype=torch.int16)).tolist() == [1, 0, 0, 1]
