from collections.abc import Callable

import numpy as np
import pytest
import torch

from workers.weights import WeightManifest, plan_manifest, read_tensors, write_tensor

TENSORS = {
    "one": torch.randn(1),
    "odd": torch.randn(3, 7),
    "scalar": torch.tensor(2.5),
    "bits": torch.randn(5, 13).to(torch.bfloat16),
    "half": torch.randn(11).to(torch.float16),
    "whole": torch.randn(4, 16),
    "empty": torch.empty(0, 4),
}


def plan(version: int = 3) -> WeightManifest:
    return plan_manifest(((name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()), version=version)


def publish(manifest: WeightManifest) -> np.ndarray:
    buffer = np.zeros(manifest.num_bytes, dtype=np.uint8)
    for entry in manifest.entries:
        write_tensor(buffer, entry, TENSORS[entry.name])
    return buffer


def test_every_tensor_comes_back_bit_for_bit_whatever_its_type_and_size():
    manifest = plan()
    read = dict(read_tensors(publish(manifest), manifest))
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_tensors_are_aligned_do_not_overlap_and_lie_inside_the_buffer():
    manifest = plan()
    end = 0
    for entry in manifest.entries:
        assert entry.offset_bytes % 64 == 0
        assert entry.offset_bytes >= end
        end = entry.offset_bytes + entry.num_bytes
        assert entry.num_bytes == TENSORS[entry.name].numel() * TENSORS[entry.name].element_size()
    assert end <= manifest.num_bytes


def test_a_manifest_carries_its_version_and_the_names_of_its_types():
    manifest = plan(version=9)
    assert manifest.version == 9
    assert {entry.dtype for entry in manifest.entries} == {"float32", "bfloat16", "float16"}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_read_only_buffer_as_the_object_store_gives_it_is_read_without_a_copy():
    manifest = plan()
    buffer = publish(manifest)
    buffer.flags.writeable = False
    for entry, (_, tensor) in zip(manifest.entries, read_tensors(buffer, manifest), strict=True):
        assert torch.equal(tensor, TENSORS[entry.name])
        if entry.num_bytes:
            assert tensor.data_ptr() == buffer.ctypes.data + entry.offset_bytes


@pytest.mark.parametrize("surplus", [-1, 1, 64])
def test_a_buffer_of_another_size_than_the_manifest_says_is_refused(surplus: int):
    manifest = plan()
    buffer = np.zeros(manifest.num_bytes + surplus, dtype=np.uint8)
    with pytest.raises(ValueError, match=rf"holds {len(buffer)} bytes, its manifest says {manifest.num_bytes}"):
        list(read_tensors(buffer, manifest))


@pytest.mark.parametrize("cut", [lambda p: p.T, lambda p: p[:, 1], lambda p: p[::2]])
def test_a_strided_view_of_a_parameter_is_written_as_its_values(cut: Callable[[torch.Tensor], torch.Tensor]):
    view = cut(torch.nn.Parameter(torch.randn(6, 4)))
    manifest = plan_manifest([("view", view.dtype, tuple(view.shape))], version=0)
    buffer = np.zeros(manifest.num_bytes, dtype=np.uint8)
    write_tensor(buffer, manifest.entries[0], view)
    ((_, read),) = read_tensors(buffer, manifest)
    assert torch.equal(read, view)


def test_a_tensor_of_another_size_than_its_entry_is_refused():
    manifest = plan_manifest([("x", torch.float32, (4,))], version=0)
    with pytest.raises(ValueError, match="broadcast"):
        write_tensor(np.zeros(64, dtype=np.uint8), manifest.entries[0], torch.zeros(5))


def test_a_publication_of_nothing_is_empty():
    manifest = plan_manifest([], version=0)
    assert manifest.num_bytes == 0
    assert list(read_tensors(np.zeros(0, dtype=np.uint8), manifest)) == []
