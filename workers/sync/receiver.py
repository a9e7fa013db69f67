"""A rollout worker's side of new weights: what it has prepared, and how that gets into its engine.

vLLM is imported when weights are loaded: the driver needs the worker's class only.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from opd_ray.config.student import LoraConfig
from opd_ray.data.lora import adapter_parameters, add_adapters
from workers.engine_loop import EngineLoop
from workers.sync.adapter import adapter_request, load_adapters
from workers.weights import Buffers, WeightManifest, check_publication


class NotPreparedError(RuntimeError):
    """A version is to be committed that this worker does not hold: it has been started anew since."""


class Receiver:
    """Holds at most one prepared version; the engine's own weights change in `commit` alone."""

    def __init__(self, engine: Any, loop: EngineLoop, *, lora: LoraConfig | None = None) -> None:
        """lora: where publications hold adapters alone."""
        engine.set_weight_version("-1")
        self.version = -1  # of the engine's weights; -1: of none, or parts of two
        self._engine = engine
        self._loop = loop
        self._lora = lora
        self._shapes: Mapping[str, tuple[int, ...]] | None = None  # of the model's tensors, once asked for
        self._prepared: tuple[WeightManifest, Buffers | None] | None = None
        self._torn = False

    def prepare(self, manifest: WeightManifest, buffers: Buffers | None) -> None:
        """Check a version against the model and hold it. Raises ValueError; nothing is changed then."""
        if self._shapes is None:
            self._shapes = published_shapes(self._engine.model_config.hf_config, lora=self._lora)
        check_publication(manifest, buffers, shapes=self._shapes)
        self._prepared = manifest, buffers

    def commit(self, version: int, update_info: Any = None) -> None:
        """Load the prepared version, between two engine steps: runs on the loop's thread.

        update_info: what vLLM's own engine is told where the bytes come through that. When loading fails midway, the
        engine holds parts of two versions: it takes no further step until a whole version has been loaded.
        """
        from workers.object_store_engine import clear_partial_load, receive, update_engine

        if self._prepared is None and self.version == version:
            return  # asked for twice
        if self._prepared is None:
            raise NotPreparedError(f"version {version} cannot be committed: prepared is None")
        if self._prepared[0].version != version:
            raise RuntimeError(f"version {version} cannot be committed: prepared is {self._prepared[0].version}")
        manifest, buffers = self._prepared
        self._loop.held = True
        if self._torn and manifest.lora is None:
            clear_partial_load(self._engine)
        self._torn, self.version = True, -1
        if update_info is not None:
            receive(self._engine, update_info)
        elif manifest.lora is not None:
            load_adapters(self._engine, manifest, _bytes(buffers))
            self._loop.request_options = {"lora_request": adapter_request()}
        else:
            update_engine(self._engine, manifest, _bytes(buffers))
        self._torn, self.version = False, version
        self._engine.set_weight_version(str(version))
        self._loop.cache_salt = str(version)  # prefixes cached under the old weights are not for the new
        self._loop.held = False
        self._prepared = None

    def forget(self) -> None:
        """The engine has given its weights away."""
        self.version = -1

    def join(self, init_info: dict[str, Any]) -> None:
        """Meet the learner where vLLM's own engine needs that: runs on the loop's thread."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})


def _bytes(buffers: Buffers | None) -> Buffers:
    assert buffers is not None, "neither bytes nor a way to them"
    return buffers


def published_shapes(config: Any, *, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a learner publishes of a model of this configuration: all of it, or its adapters."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=False)
        if lora is not None:
            add_adapters(model, lora)
    named = model.named_parameters() if lora is None else adapter_parameters(model)
    return {name: tuple(parameter.shape) for name, parameter in named}
