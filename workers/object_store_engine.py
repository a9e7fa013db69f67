"""A vLLM weight-transfer engine that reads a published buffer from Ray's object store.

Registered beside vLLM's own `nccl` and `ipc` engines; it serves CPU clusters and any worker that cannot join those.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from workers.weights import Buffers, WeightManifest, read_tensors

BACKEND = "object_store"


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: each update carries its own manifest."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One whole publication."""

    manifest: WeightManifest
    buffers: Buffers


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Loads every tensor of a publication into the model, layer by layer."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """No rendezvous is needed."""

    def start_weight_update(self) -> None:
        """Give layers back their loadable form (vLLM packs CPU weights at load)."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Load all tensors; vLLM copies from the read-only views."""
        self.model.load_weights(read_tensors(update_info.buffers, update_info.manifest))

    def finish_weight_update(self) -> None:
        """Pack the layers again, and the tied head, which vLLM's reload leaves at its old values on CPU."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model, self.device)

    def shutdown(self) -> None:
        """Nothing is held."""


def repack_tied_head(model: torch.nn.Module, device: torch.device) -> None:
    """Redo the packing of a head that shares its matrix with the input embedding.

    vLLM's CPU build keeps a packed copy of the head. A reload writes the embedding's matrix; the packed copy stays as
    it was, silently, until it is made again.
    """
    head = getattr(model, "lm_head", None)
    if device.type == "cpu" and head is not None and model.config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)


def update_engine(engine: Any, manifest: WeightManifest, buffers: Buffers) -> None:
    """Give an engine, whichever its backend, all tensors of a publication, between two of its steps.

    Prefixes cached under the old weights stay cached: what is asked from now on needs another salt.
    """
    engine.collective_rpc(_load, args=(manifest, buffers))


def receive(engine: Any, update_info: Any) -> None:
    """Have an engine take a whole version through its own backend, between two of its steps."""
    engine.collective_rpc("start_weight_update")
    engine.collective_rpc("update_weights", kwargs={"update_info": update_info})
    engine.collective_rpc("finish_weight_update")


def clear_partial_load(engine: Any) -> None:
    """Drop what an update that failed midway has left: layers that wait for their other half would take the old one.

    Weights are those of two versions afterwards, and a new update finds every layer as an update expects it.
    """
    engine.collective_rpc(_clear_partial_load)


def _load(wrapper: Any, manifest: WeightManifest, buffers: Buffers) -> None:
    worker = wrapper.worker
    native = worker.weight_transfer_engine
    if not isinstance(native, ObjectStoreWeightTransferEngine):  # of a worker that missed a version: see `catch_up`
        worker.weight_transfer_engine = ObjectStoreWeightTransferEngine(
            native.config, worker.vllm_config, worker.device, native.model
        )
    try:
        worker.start_weight_update()
        worker.update_weights({"manifest": manifest, "buffers": buffers})
        worker.finish_weight_update()
    finally:
        worker.weight_transfer_engine = native


def _clear_partial_load(wrapper: Any) -> None:
    engine = wrapper.worker.weight_transfer_engine
    with set_current_vllm_config(wrapper.worker.vllm_config):
        finalize_layerwise_reload(engine.model, engine.model_config)


def register() -> None:
    """Make the engine known to vLLM under `BACKEND`; harmless when repeated."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreWeightTransferEngine)
