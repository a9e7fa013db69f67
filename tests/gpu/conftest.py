"""The real stack on GPUs."""

from stack_fixtures import model_folder, no_cluster_left, overrides

__all__ = ["model_folder", "no_cluster_left", "overrides"]
