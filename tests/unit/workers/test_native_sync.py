"""What is told to vLLM's own weight-transfer engines, against the types that they read it with."""

from dataclasses import asdict, fields

import pytest
import torch
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine, NCCLWeightTransferUpdateInfo

from opd_ray.config.weight_sync import WeightSync
from workers.sync import ipc, nccl
from workers.sync.choose import ENGINES
from workers.sync.native import Meeting, NativePublisher, StudentSource, WorkersClient, joining_infos
from workers.sync.source import StudentWeights
from workers.weights import read_tensors

MEETING = Meeting(address="10.0.0.1", port=4000, num_workers=3)


def weights(dtype: torch.dtype = torch.bfloat16) -> StudentWeights:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    return StudentWeights(student, dtype=dtype, partitioned=False, reads=True)


@pytest.mark.parametrize("sync", [WeightSync.nccl, WeightSync.ipc])
def test_vllm_has_an_engine_and_a_trainer_of_each_native_way(sync: WeightSync):
    assert ENGINES[sync] in WeightTransferEngineFactory._registry
    assert ENGINES[sync] in WeightTransferTrainerFactory._registry
    info = {
        WeightSync.nccl: nccl.trainer_info(MEETING, rank=0, ranks_per_worker=1),
        WeightSync.ipc: ipc.trainer_info(MEETING, rank=0),
    }
    assert info[sync].backend == sync.value


def test_rank_zero_of_the_learner_alone_sends():
    for rank, sends in ((0, True), (1, False)):
        assert nccl.trainer_info(MEETING, rank=rank, ranks_per_worker=1).is_sender is sends
        assert ipc.trainer_info(MEETING, rank=rank).is_sender is sends


def test_the_workers_of_a_group_have_ranks_of_their_own_behind_the_learners():
    told = nccl.trainer_info(MEETING, rank=0, ranks_per_worker=2)
    assert told.world_size == 7
    # as vLLM's trainer makes it of ours (`NCCLTrainerWeightTransferEngine.trainer_init`)
    common = {f.name: getattr(told, f.name) for f in fields(NCCLWeightTransferInitInfo) if hasattr(told, f.name)}
    payload = worker_init_payload(NCCLWeightTransferInitInfo(**common, rank_offset=1))
    infos = [NCCLWeightTransferInitInfo(**info) for info in joining_infos(payload, num_workers=3)]
    ranks = [info.rank_offset + rank for info in infos for rank in range(2)]
    assert ranks == [1, 2, 3, 4, 5, 6]
    assert {(i.master_address, i.master_port, i.world_size, i.packed) for i in infos} == {("10.0.0.1", 4000, 7, True)}


def test_without_a_group_every_worker_is_told_the_same():
    infos = joining_infos({"packed": ipc.trainer_info(MEETING, rank=0).packed}, num_workers=2)
    assert [IPCWeightTransferInitInfo(**info).packed for info in infos] == [False, False]


def test_the_update_that_vllm_makes_of_our_source_is_what_its_engines_read():
    source = StudentSource(weights())
    described = {
        "names": [m.name for m in source.metadata()],
        "dtype_names": [str(m.dtype).split(".")[-1] for m in source.metadata()],
        "shapes": [list(m.shape) for m in source.metadata()],
    }
    update = NCCLWeightTransferUpdateInfo(**described)
    assert NCCLWeightTransferUpdateInfo(**asdict(update)) == update
    handles = [{"GPU-0": ()} for _ in described["names"]]
    assert IPCWeightTransferUpdateInfo(**described, ipc_handles=handles).names == described["names"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllms_own_check_finds_that_the_source_yields_what_it_declares(dtype: torch.dtype):
    source = StudentSource(weights(dtype))
    for _ in range(2):
        sent = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
        assert list(sent) == [m.name for m in source.metadata()]
    assert [names for names, _ in source.iter_groups()] == source.groups()


def test_the_client_has_what_vllms_trainers_call():
    assert isinstance(WorkersClient([]), VLLMWeightSyncClient)


def test_a_native_publication_has_no_bytes_and_is_refused_once_the_student_has_changed():
    num_updates = [4]
    publisher = NativePublisher(
        weights(), rank=0, describe=lambda _: ipc.trainer_info(MEETING, rank=0), num_updates=lambda: num_updates[0]
    )
    manifest, buffers = publisher.publish(7)
    assert buffers is None
    assert manifest is not None
    stored_manifest, stored = publisher.store(7)
    assert stored_manifest == manifest
    assert stored is not None
    assert len(list(read_tensors(stored, manifest))) == 4
    for call in (publisher.store, publisher.send):
        with pytest.raises(RuntimeError, match="version 6 is gone"):
            call(6)
    num_updates[0] += 1
    for call in (publisher.store, publisher.send):
        with pytest.raises(RuntimeError, match="version 7 is gone"):
            call(7)


def test_ranks_beside_the_first_publish_nothing():
    publisher = NativePublisher(
        weights(), rank=1, describe=lambda _: ipc.trainer_info(MEETING, rank=1), num_updates=lambda: 0
    )
    assert publisher.publish(0) == (None, None)
