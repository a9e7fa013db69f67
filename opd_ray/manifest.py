"""MANIFEST.json of a checkpoint: what files it has, with sizes and checksums, and what the run was made of."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"  # written last: without it the folder is no checkpoint
_FORMAT = 1
_NUM_THREADS = 8
_BLOCK = 2**22  # bytes read at once


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flush every file of a folder to the disk, then write the manifest. Raises OSError."""
    files = _files(folder)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        sums = list(pool.map(lambda name: _flushed_sum(folder / name), files))
    of_files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(files, sums, strict=True)
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump({"format": _FORMAT, **facts, "files": of_files}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)


def damage(folder: Path) -> str:
    """Return what is wrong with a sealed folder: the first file that is not as it was written; nothing if all are."""
    try:
        written = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, expected in written["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    names = list(written["files"])
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        sums = pool.map(lambda name: _sum(folder / name), names)
        changed = [n for n, found in zip(names, sums, strict=True) if found != written["files"][n]["sha256"]]
    return f"{changed[0]} is not as it was written (checksum)" if changed else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest. Raises ValueError where there is none, or none of ours."""
    try:
        written = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"has no {MANIFEST}, it was not finished") from None
    except (OSError, ValueError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if not isinstance(written, dict) or written.get("format") != _FORMAT or not isinstance(written.get("files"), dict):
        raise ValueError(f"{MANIFEST} is of another format, expected format {_FORMAT}")
    return written


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _flushed_sum(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sum(path)


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
