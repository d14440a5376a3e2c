"""Show a run in the browser, beside its pretrained model."""

import argparse
import importlib.util
from pathlib import Path

from diffrl.errors import DiffRLError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    what = "a folder of 'diffrl train' or 'diffrl export'"
    parser.add_argument("run_folder", type=Path, metavar="RUN", help=what)
    parser.add_argument("-n", type=int, default=4, help="pictures of each (default 4)")
    parser.add_argument("--port", type=int, help="(default: the first that is free from 7860)")


def run(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise DiffRLError(
            "the demo is made with gradio, which is not installed: pip install 'diffrl[demo]'"
        )
    from diffrl.demo import Easel, launch, page
    from diffrl.log import console

    blocks = page(Easel(options.run_folder, options.n))
    console.print(f"{launch(blocks, options.port)} shows {options.run_folder}; Ctrl-C ends it")
    blocks.block_thread()
