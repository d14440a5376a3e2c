"""Where a number is from: what it depends on besides its settings."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "version": __version__,
        "commit": found.stdout.strip() if found and not found.returncode else "not a checkout",
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "transformers", "peft")},
        **{name: version(name) for name in ("brisque",) if find_spec(name)},
        "python": sys.version.split()[0],
        "hardware": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
    }


def _processor() -> str:
    """Return the CPU's name where the system tells one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
