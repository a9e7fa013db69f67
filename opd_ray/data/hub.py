"""Finds a model's files: a local folder as it is, a hub name through the Hugging Face cache."""

from pathlib import Path

from huggingface_hub import snapshot_download

_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def local_folder(path: str) -> Path:
    """Return the folder that holds the model; downloads a hub name into the cache once, safetensors only."""
    folder = Path(path)
    return folder if folder.is_dir() else Path(snapshot_download(path, allow_patterns=_FILES))
