"""Writes a rank's part of a DeepSpeed checkpoint without leaving the other ranks alone in a collective call."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from workers.fault_plan import Phase, reach

TAG = "deepspeed"


class EngineSaver:
    """Writes at once, or copies what is to be written into the machine's memory and writes that beside the training.

    DeepSpeed's calls in common follow the write: a rank that left there would be waited for by the others, without end.
    A fault of the write is therefore raised after them, or by `wait`.
    """

    def __init__(self, engine: Any, *, exclude_frozen: bool) -> None:
        """exclude_frozen: leave the weights out that no update changes."""
        self._engine = engine
        self._exclude_frozen = exclude_frozen
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._write = engine.checkpoint_engine.save
        self._pending: list[Future[None]] = []
        engine._copy_recovery_script = lambda *_: None  # a script of DeepSpeed's own, beside its files

    def save(self, folder: str, *, in_background: bool, client_state: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write a checkpoint; all ranks call this at once. Raises OSError on a rank that cannot write its part.

        in_background: return once what `wait` waits for is copied. client_state: is part of the checkpoint.
        """
        engine, step, faults = self._engine, self._engine.global_steps, list[str]()

        def held(state_dict: Any, path: str) -> None:
            if in_background:
                copied = tree_map_only(torch.Tensor, _host_copy, state_dict)
                self._pending.append(self._thread.submit(self._written, copied, path, step))
                return
            try:
                self._written(state_dict, path, step)
            except OSError as fault:
                faults.append(str(fault))

        engine.checkpoint_engine.save = held
        try:
            engine.save_checkpoint(
                folder,
                tag=TAG,
                client_state=dict(client_state),
                save_latest=False,
                exclude_frozen_parameters=self._exclude_frozen,
            )
        finally:
            engine.checkpoint_engine.save = self._write
        if faults:
            raise OSError(faults[0])

    def wait(self) -> None:
        """Wait until everything is written. Raises OSError for what could not be."""
        pending, self._pending = self._pending, []
        faults = [fault for fault in [future.exception() for future in pending] if fault]
        if faults:
            raise faults[0]

    def _written(self, state_dict: Any, path: str, step: int) -> None:
        try:
            reach(Phase.save, step=step)
            self._write(state_dict, path)
        except (OSError, RuntimeError) as fault:  # torch's writer tells a full disk as a RuntimeError
            raise OSError(f"{path}: {str(fault).strip().splitlines()[0]}") from None


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
