"""How a ZeRO-3 rank comes by its part of the student without ever holding all of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def partitioned_loading(deepspeed_config: Mapping[str, Any]) -> Iterator[None]:
    """Within, at stage 3, `from_pretrained` cuts every parameter over the ranks as it is made; else change nothing.

    torch.distributed must be up, and all ranks load at once. Rank 0 reads the files, one module at a time.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    stage = deepspeed_config["zero_optimization"]["stage"]
    held = HfDeepSpeedConfig(dict(deepspeed_config)) if stage == 3 else None  # transformers has a weak reference to it
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


@contextmanager
def gathered_by_module(model: Any) -> Iterator[None]:
    """Within, each module of a partitioned model is whole while it runs; DeepSpeed's own hooks come with its engine."""
    import deepspeed

    gathered: dict[Any, Any] = {}

    def gather(module: Any, _: Any) -> None:
        gathered[module] = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        gathered[module].__enter__()

    def partition(module: Any, _: Any, __: Any) -> None:
        gathered.pop(module).__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(gather))
            handles.append(module.register_forward_hook(partition, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
