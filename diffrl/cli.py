"""The `diffrl` command. Nothing heavy is imported before a subcommand needs it."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffrl.errors import DiffRLError

_EPILOG = """\
settings are Hydra's key=value words, after 'train' or 'fit':
  diffrl train                                      ctrl on the emoji model, in minutes, on a laptop
  diffrl train algo.gamma=5000 seed=1 name=strong   any setting by its name
  diffrl train +experiment=emoji_full               a preset; 'diffrl list' shows them
  diffrl train env=sd15 prompts=my_words.txt        Stable Diffusion v1.5, your prompts
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake in what was asked."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        if rest and not hasattr(options, "words"):
            raise DiffRLError(f"{rest[0]}: no such option of 'diffrl {options.command}'; see --help.")
        options.words = [*getattr(options, "words", []), *rest]
        _quieten()
        options.run(options)
    except DiffRLError as error:
        print(f"diffrl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffrl: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffrl",
        description="RL fine-tuning of diffusion models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    train = add("train", _train, "train a policy; writes runs/NAME")
    train.add_argument("words", nargs="*", metavar="key=value", help="settings; see 'diffrl list'")
    every = "train every combination of settings given with commas, through hydra/launcher=..."
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    train.add_argument("-m", "--multirun", action="store_true", help=every)
    fit = add("fit", _fit, "fit and calibrate a learned reward alone")
    fit.add_argument("words", nargs="*", metavar="key=value", help="settings, such as dataset=FOLDER")
    fit.add_argument("--out", type=Path, help="also write the classifier to this file")

    doctor = add("doctor", _doctor, "check that env, algorithm, reward and precision are numerically sound")
    doctor.add_argument("words", nargs="*", metavar="key=value", help="settings, as for 'train'")

    evaluate = add("eval", _eval, "measure a run: accuracy by the true measure, KL, cost")
    model = "a folder of 'diffrl train' and guidance=..., or settings of the pretrained model"
    evaluate.add_argument("words", nargs="*", metavar="RUN | key=value", help=model)
    evaluate.add_argument("-n", type=int, default=512, help="pictures (default 512)")
    evaluate.add_argument("--seed", type=int, default=42, help="of noise and prompts (default 42)")
    evaluate.add_argument("--prompts", help="another list or file than the run's")
    evaluate.add_argument("--control-scale", type=float, default=1.0, help="strength (default 1)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    sample = add("sample", _sample, "draw pictures with a run's policy")
    sample.add_argument("words", nargs="*", metavar="RUN | key=value", help=model)
    sample.add_argument("--prompt", required=True, help="what to draw")
    sample.add_argument("--label", default="", help="the control, such as 3, or 1,0 of two (default: none)")
    sample.add_argument("-n", type=int, default=8, help="pictures (default 8)")
    sample.add_argument("--control-scale", type=float, default=1.0, help="strength (default 1)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    sample.add_argument("--out", type=Path, help="folder to write to (default RUN/samples, or samples)")

    compare = add(
        "compare", _compare, "train every row of a suite, some seeds each, and show them together"
    )
    compare.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="suite=NAME, settings of all; 'verify' runs a cell again",
    )
    compare.add_argument(
        "--quick", action="store_true", help="one seed, no tuning, less work: a look, no result"
    )
    compare.add_argument("--seeds", type=int, help="seeds a row (default: the suite's)")
    compare.add_argument(
        "--jobs", type=int, default=2, help="cells at a time, sharing the cores (default 2)"
    )
    compare.add_argument("--root", type=Path, default=Path("runs/compare"), help="holds the cells' runs")
    compare.add_argument("--out", type=Path, help="folder of the result (default: that of the cells)")
    compare.add_argument("--json", action="store_true", help="print one JSON record a row")

    report = add("report", _report, "write one HTML page of suites and runs, with nothing from outside")
    report.add_argument(
        "sources", nargs="+", type=Path, metavar="RUN_OR_SUITE", help="folders, or a suite's JSON"
    )
    report.add_argument("--out", type=Path, default=Path("report.html"), help="(default report.html)")

    imported = add(
        "import-ctrl", _import_ctrl, "make a run of a checkpoint that CTRL's authors have published"
    )
    imported.add_argument(
        "source", type=Path, metavar="DIR", help="with pytorch_lora_weights and class_embedding.pth"
    )
    chosen = "reward.classifier=PATH.pth, and others over +experiment=ctrl_paper"
    imported.add_argument("words", nargs="*", metavar="key=value", help=chosen)

    add("list", _list, "show what can be chosen: algorithms, envs, rewards, presets, suites, prompt lists")
    return parser


def _train(options: argparse.Namespace) -> None:
    from diffrl import config, run

    if options.resume is not None:
        if options.words or options.multirun:
            raise DiffRLError(f"--resume {options.resume}: its settings are its own; give nothing besides.")
        run.resume(options.resume)
    elif options.multirun:
        config.sweep(options.words, run.train)
    else:
        run.train(config.load(options.words))


def _fit(options: argparse.Namespace) -> None:
    from diffrl import config
    from diffrl.build import Setup, is_learned
    from diffrl.log import console
    from diffrl.restore import describe
    from diffrl.rewards.log_likelihood import LogLikelihood

    settings = config.load(options.words)
    if not is_learned(settings.reward):
        raise DiffRLError(
            f"reward={config.chosen(settings, 'reward')}: a black box, there is nothing to fit. "
            "Use reward=compressibility."
        )
    setup = Setup(settings)
    reward = setup.make_reward(setup.make_policy(setup.num_classes()))
    assert isinstance(reward, LogLikelihood)
    console.print(describe(reward))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        reward.save(options.out)
        console.print(f"wrote {options.out}; use it with reward.classifier={options.out}")


def _doctor(options: argparse.Namespace) -> None:
    from rich.table import Table

    from diffrl import config
    from diffrl.doctor import examine
    from diffrl.log import console

    findings = examine(config.load(options.words))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "check", "found"):
        table.add_column(heading)
    for finding in findings:
        mark = "[green]ok[/]" if finding.sound else "[bold red]bad[/]"
        table.add_row(mark, finding.check, finding.value)
    console.print(table)
    for finding in findings:
        if not finding.sound:
            console.print(f"[bold red]{finding.check}[/]: {finding.advice}")
    if not all(finding.sound for finding in findings):
        sys.exit(1)


def _compare(options: argparse.Namespace) -> None:
    from diffrl.benchmarks import compare, suites, summary
    from diffrl.log import console, print_wide

    chosen = [word for word in options.words if word.startswith("suite=")]
    if len(chosen) != 1:
        raise DiffRLError(f"give one suite, as suite=NAME; known: {', '.join(suites.suites())}.")
    for option in ("seeds", "jobs"):
        if (count := getattr(options, option)) is not None and count < 1:
            raise DiffRLError(f"--{option} {count}: must be 1 or more.")
    words = [word for word in options.words if word not in (*chosen, "verify")]
    path = chosen[0].removeprefix("suite=")
    console.stderr = options.json  # standard output is the records alone
    suite, name = suites.load(path), Path(path).stem
    name += "-quick" if options.quick else ""
    folder = options.root / name
    out = options.out or folder
    earlier = summary.stored_records(out / f"{name}.json")
    if "verify" in options.words:
        _verify(compare.read(folder) or earlier[0], suite, folder)
        return
    records, trials = compare.compare(
        suite,
        folder,
        words=words,
        seeds=options.seeds,
        jobs=options.jobs,
        quick=options.quick,
        earlier=earlier,
        save=lambda cells, trials: summary.store(name, suite, cells, trials, out),
    )
    rows = summary.report(name, suite, records, trials, out)
    if options.json:
        for row in rows:
            print(json.dumps(summary.bare(row)))
    else:
        print_wide(summary.table(suite, rows))
        console.print(f"{out}/{name}.json has every number")
    if any(row["failed"] for row in rows):
        sys.exit(1)


def _eval(options: argparse.Namespace) -> None:
    from diffrl.evaluate_mixture import table
    from diffrl.log import console
    from diffrl.restore import measure
    from diffrl.rewards.closed_form import ClosedForm
    from diffrl.tables import show

    if options.n < 1:
        raise DiffRLError(f"-n {options.n}: must be 1 or more.")
    setup, policy, reward = _model(options)
    measures = measure(setup, policy, reward, options.n, options.seed)
    if options.json:
        print(json.dumps(measures))
    elif isinstance(reward, ClosedForm):
        console.print(table(measures))
    else:
        show(measures, reward)


def _report(options: argparse.Namespace) -> None:
    from diffrl.benchmarks.report import write
    from diffrl.log import console

    path = write(options.sources, options.out)
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _import_ctrl(options: argparse.Namespace) -> None:
    from diffrl.import_ctrl import import_checkpoint
    from diffrl.log import console

    folder = import_checkpoint(options.source, options.words)
    console.print(f"[bold]{folder}[/]: next, diffrl eval {folder}")


def _verify(records: list[dict[str, Any]], suite: Any, folder: Path) -> None:
    import random

    from diffrl.benchmarks.compare import verify
    from diffrl.log import console

    wrong = verify(suite, folder, records, random.randrange(1 << 30))
    for line in wrong:
        console.print(f"[bold red]differs[/]: {line}")
    if wrong:
        sys.exit(1)
    console.print("every column lies where it was")


def _run_folder(words: list[str]) -> Path | None:
    """Return the folder among the words of 'eval' and 'sample', the first, if it is one."""
    if not words:
        raise DiffRLError("give the folder of a run, or settings such as env=emoji guidance=svdd.")
    return None if "=" in words[0] else Path(words[0])


def _model(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return setup, policy and reward of a run, or of the pretrained model with these settings."""
    from diffrl import config
    from diffrl.restore import pretrained, restore

    folder, words = _run_folder(options.words), options.words
    prompts = getattr(options, "prompts", None)
    if folder is None:
        words = ["algo=none", *words, *([f"eval_prompts={prompts}"] if prompts else [])]
        setup, policy, reward = pretrained(config.load(words))
    else:
        overrides: dict[str, Any] = {"eval_prompts": prompts} if prompts else {}
        if guided := words[1:]:
            for word in guided:
                if not word.startswith(("guidance", "clip=", "eval_batch=")):
                    raise DiffRLError(
                        f"{word}: {folder} was trained with settings of its own; give guidance=..."
                    )
            asked = config.load(guided)
            overrides |= {"guidance": asked.guidance, "clip": asked.clip, "eval_batch": asked.eval_batch}
        setup, policy, reward = restore(folder, overrides)
    policy.control_scale = options.control_scale
    return setup, policy, reward


def _sample(options: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from diffrl.algorithms.guidance.base import Unguided
    from diffrl.evaluate import label_name, measures_of
    from diffrl.log import console, grid
    from diffrl.rewards.closed_form import ClosedForm
    from diffrl.rewards.log_likelihood import LogLikelihood
    from diffrl.rollout import rollout
    from diffrl.types import NO_LABEL, to_pixels

    if options.n < 1:
        raise DiffRLError(f"-n {options.n}: must be 1 or more.")
    setup, policy, reward = _model(options)
    if isinstance(reward, ClosedForm):
        raise DiffRLError(f"{options.words[0]}: its model draws points, not pictures; use 'diffrl eval'.")
    label = _label(options.label, len(reward.num_classes))
    asked = any(y != NO_LABEL for y in label.tolist())
    if not asked and reward.num_classes and not isinstance(setup.config.guidance, Unguided):
        raise DiffRLError("no --label: guidance asks for a label, or it has nothing to go by.")
    actor = setup.guide(policy, reward, options.n)
    generator = torch.Generator(setup.device).manual_seed(options.seed)
    count = actor.env.num_envs
    wanted = {"prompts": [options.prompt] * count, "label": label.expand(count, -1)}
    trajectory = rollout(actor.env, actor, generator, seed=options.seed, options=wanted)
    images = trajectory.images[actor.chosen(generator)]
    folder = options.out or (_run_folder(options.words) or Path()) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    stem = options.prompt.replace(" ", "-").replace("/", "-")
    stem += f"-label{label_name(label)}" if len(label) else ""
    for number, pixels in enumerate(to_pixels(images)):
        Image.fromarray(pixels).save(folder / f"{stem}-{number:02d}.png")
    across = 8
    rows = list(images.split(across))
    rows[-1] = torch.cat([rows[-1], rows[-1].new_ones(len(rows[0]) - len(rows[-1]), *rows[0].shape[1:])])
    grid(rows, [""] * len(rows)).save(folder / f"{stem}.png")
    of_class = ""
    if asked and isinstance(reward, LogLikelihood):
        hits = int((reward.true_class(images) == label).all(1).sum())
        of_class = f", {hits} of true class {label_name(label)}"
    spans = []
    for measure in measures_of(reward):
        values = measure.of(images).tolist()
        spans.append(f"{min(values):.2f} to {max(values):.2f} {measure.unit or measure.title}")
    console.print(f"{folder / stem}.png: {options.n} pictures, {', '.join(spans)}{of_class}")


def _label(text: str, attributes: int) -> Any:
    """Return the label that `--label` asks for, `[attributes]`; NO_LABEL throughout if it is empty."""
    import torch

    from diffrl.types import NO_LABEL

    if not text:
        return torch.full((attributes,), NO_LABEL)
    if not attributes:
        raise DiffRLError(f"--label {text}: this run has no labels, its reward has no classes.")
    numbers = text.split(",")
    if len(numbers) != attributes or not all(number.lstrip("-").isdecimal() for number in numbers):
        example = ",".join("0" * attributes)
        raise DiffRLError(f"--label {text}: not {attributes} number(s); give them as --label {example}.")
    return torch.tensor([int(number) for number in numbers])


def _list(options: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    from diffrl import config
    from diffrl.benchmarks.suites import suites
    from diffrl.envs.prompts import LISTS
    from diffrl.log import console

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("choice", no_wrap=True)
    table.add_column("what it is")
    for group, known in config.GROUPS.items():
        for name, kind in known.items():
            table.add_row(f"{group}={name}", escape((kind.__doc__ or "").splitlines()[0]))
    table.add_row("reward=FILE.py:NAME", "A function (images, context) -> [N] of yours, or a class.")
    for name, line in config.experiments().items():
        table.add_row(f"+experiment={name}", line)
    for name, path in suites().items():
        table.add_row(f"suite={name}", path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    for name, words in LISTS.items():
        table.add_row(f"prompts={name}", f"{len(words)} words: {', '.join(words[:5])}, ...")
    table.add_row("prompts=PATH.txt", "one prompt per line")
    console.print(table)


def _quieten() -> None:
    """Keep the libraries' advice (missing torchvision, progress of loading) off the screen."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
