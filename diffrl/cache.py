"""Where what is fitted once is kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of fitted networks: $DIFFRL_CACHE, or `diffrl` in the user's cache."""
    if home := os.environ.get("DIFFRL_CACHE"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffrl"
