"""Scores on disk: what a run records of its groups and scores, and how a later run reads them.

A folder holds `manifest.json` (who was asked what, over which vocabulary), `index.jsonl` (a line a shard, written after
the shard itself) and shards, safetensors files of at most one update each.
"""

from opd_ray.scores.checks import check_offered, check_recording
from opd_ray.scores.files import Recording, prepare_folder, read_recording
from opd_ray.scores.manifest import Manifest, manifest_of
from opd_ray.scores.prompts import recorded_prompts

__all__ = [
    "Manifest",
    "Recording",
    "check_offered",
    "check_recording",
    "manifest_of",
    "prepare_folder",
    "read_recording",
    "recorded_prompts",
]
