"""Whether this machine is logged in to Weights & Biases."""

import netrc
import os
from urllib.parse import urlsplit


def has_wandb_credentials() -> bool:
    """Whether WANDB_API_KEY is set or the netrc file has an entry; never what it is."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
