"""The machine is shared: one thread for torch, no look at the hub, and no example of a property is late."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
