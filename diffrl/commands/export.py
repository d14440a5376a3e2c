"""Write a run for other tools: diffusers, ComfyUI, the hub."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a folder of 'diffrl train'")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write; must not be there")
    parser.add_argument(
        "--format", default="diffrl", help="diffrl: all of it (default); diffusers, kohya: the LoRA alone"
    )
    parser.add_argument("-n", type=int, default=64, help="pictures for the card's numbers (default 64)")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload it too, as owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(options: argparse.Namespace) -> None:
    """Write the folder, say how its pictures compare, and upload it if asked to."""
    from diffrl.export import check_repo_id, export, push
    from diffrl.log import console

    if options.push_to_hub:
        check_repo_id(options.push_to_hub)
    compared = export(options.run_folder, options.out, options.format, options.n)
    console.print(
        f"{options.out}: reloaded, it draws the run's pictures: {compared.pictures} differ by at most "
        f"{compared.difference:.1e} of a pixel's range, from the pretrained ones by {compared.distance:.2f}"
    )
    if compared.label_left_out:
        console.print("It draws what label=None draws, a LoRA cannot hold labels; --format diffrl does.")
    if options.push_to_hub:
        console.print(push(options.out, options.push_to_hub, private=options.private))
