"""The real stack on CPU."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from ranks import ranks
from stack_fixtures import model_folder, no_cluster_left, overrides

__all__ = ["model_folder", "no_cluster_left", "overrides", "ranks"]
