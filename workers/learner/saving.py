"""Writes a rank's part of a DeepSpeed checkpoint without leaving the other ranks alone in a collective call."""

from typing import Any

TAG = "deepspeed"


def save_engine(engine: Any, folder: str, *, exclude_frozen: bool) -> None:
    """Write a checkpoint; all ranks call this at once. Raises OSError on a rank that cannot write its part.

    DeepSpeed's calls in common follow the write: a rank that left there would be waited for by the others, without end.
    Its fault is therefore raised after them.
    """
    writer, faults = engine.checkpoint_engine, list[str]()
    write = writer.save

    def held(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as fault:  # torch's writer tells a full disk as a RuntimeError
            faults.append(f"{path}: {str(fault).strip().splitlines()[0]}")

    writer.save = held
    engine._copy_recovery_script = lambda *_: None  # a script of DeepSpeed's own, beside its files
    try:
        engine.save_checkpoint(folder, tag=TAG, save_latest=False, exclude_frozen_parameters=exclude_frozen)
    finally:
        writer.save = write
    if faults:
        raise OSError(faults[0])
