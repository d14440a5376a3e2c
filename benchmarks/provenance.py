"""Where a number is from: what it depends on besides its settings."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from diffrl import __version__


def provenance() -> dict[str, str]:
    """Return versions, commit and hardware."""
    home = Path(__file__).resolve().parent
    git = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12"]
    found = (
        subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "version": __version__,
        "commit": found.stdout.strip() if found and not found.returncode else "not a checkout",
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "transformers", "peft")},
        "python": sys.version.split()[0],
        "hardware": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
    }
