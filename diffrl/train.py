"""From settings to a finished run: begun, stopped, gone on with; and the folder it is in.

`runs/<name>/`: `config.yaml`, `metrics.jsonl`, `tensorboard/`, `pictures/`, `classifier.safetensors`,
`checkpoints/`, `.lock` (see `diffrl.lock`), and of the last evaluation, or the best,
`pytorch_lora_weights.safetensors` and `control.safetensors`.
"""

import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from shlex import quote

from diffrl import checkpoint, disk, lock, processes, settings_file, weights
from diffrl import config as settings
from diffrl.build import Setup
from diffrl.config import Config, key_of
from diffrl.conflicts import check_new
from diffrl.errors import DiffRLError
from diffrl.learned import warn_of_unreadable
from diffrl.log import RunLog, console
from diffrl.restore import (
    CLASSIFIER_FILE,
    CONFIG_FILE,
    describe,
    fit_metrics,
    pretrained,
    settings_of,
    untrained,
)
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.run import CHECKPOINTS, Run
from diffrl.settings_file import AT_A_TIME
from diffrl.stop import StopSignals

_ELSEWHERE = "Make room, or give another root=FOLDER, and begin again."


@processes.together()
def train(config: Config) -> Path:
    """Fit the reward if it is a learned one, train the policy, and return the run's folder.

    With `resume=auto` a run of these settings that is there already goes on from its last checkpoint.

    Raises:
        DiffRLError: a run of that name is there and shall not, or cannot, be resumed.
        KeyboardInterrupt: SIGINT came; the state so far is in a checkpoint.
    """
    begin = time.perf_counter()
    folder = _folder(config)
    if folder.exists():
        if not is_of(folder, config):
            raise DiffRLError(
                f"{folder}: a run of other settings, so resume=auto cannot go on with it. Give another "
                f"name=..., or 'diffrl train --resume {quote(str(folder))}' for it as it is."
            )
        return _resume(folder, config, begin)
    check_new(config)
    setup = Setup(config)
    if processes.is_first():
        with disk.told(folder.parent, _ELSEWHERE):  # before the fit, which may take long
            disk.probe(folder.parent)
    policy, reward = pretrained(setup)
    run = Run(setup, policy, reward, folder)
    processes.wait()  # until all have seen that it is not there
    with ExitStack() as until_done:
        if processes.is_first():
            # under another name until it has a checkpoint: a run that is there can be resumed
            _sweep_drafts(folder)
            draft = folder.with_name(f".{folder.name}.draft-{uuid.uuid4().hex}")
            with disk.told(draft, _ELSEWHERE):
                draft.mkdir(parents=True)
                until_done.enter_context(lock.held(draft))
                settings_file.write(config, draft / CONFIG_FILE)
                if isinstance(reward, LogLikelihood):
                    reward.save(draft / CLASSIFIER_FILE)
                    console.print(describe(reward))
                run.save(draft / CHECKPOINTS)
                disk.sync(draft)
                _rename(draft, folder)
        processes.wait()
        return _finish(run, begin)


@processes.together()
def resume(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Go on with a run from its last checkpoint that is whole, and return its folder.

    Args:
        folder: of the run.
        overrides: `key=value` words of how many pictures are held at a time, the run's from here on: for a
            machine with less memory. They change what is drawn, not the law it is drawn from.

    Raises:
        DiffRLError: no such run, none of its checkpoints is whole, or another setting among the words.
    """
    for word in overrides:
        if key_of(word) not in AT_A_TIME:
            raise DiffRLError(
                f"{word}: the settings of {folder} are its own; all that may change is "
                f"{' and '.join(AT_A_TIME)}."
            )
    folder = folder if folder.name not in ("", "..") else folder.resolve()  # '.' has no name
    config = settings_of(folder, overrides)
    config.root, config.name = str(folder.parent), folder.name  # it may have moved
    return _resume(folder, config, time.perf_counter())


def is_of(folder: Path, config: Config) -> bool:
    """Return whether the run in a folder has these settings, so that `resume=auto` can go on with it.

    Raises:
        DiffRLError: there is no run, or its settings cannot be read.
    """
    return settings_file.same(settings_file.facts(settings_of(folder)), config)


def is_done(folder: Path) -> bool:
    """Return whether the run in a folder has come to its end, and was not stopped on the way."""
    last = next(checkpoint.newest_first(folder / CHECKPOINTS), None)
    try:
        return last is not None and bool(checkpoint.read(last).state.get("done"))
    except checkpoint.DamagedError:  # it goes on from the one before
        return False


def _resume(folder: Path, config: Config, begin: float) -> Path:
    parts = untrained(folder, config)  # first: it meets the other processes, of which one takes the lock
    # nothing is written to a finished run, so it may lie where nothing can be
    with nullcontext() if is_done(folder) else lock.held(folder):
        run = Run(*parts, folder)
        run.load(folder / CHECKPOINTS)
        if run.done:
            console.print(f"[bold]{folder}[/]: finished already, {run.update} updates")
            return folder
        if processes.is_first():
            settings_file.write(config, folder / CONFIG_FILE)  # as it goes on
        console.print(f"[bold]{folder}[/]: goes on after update {run.update} of {config.algo.updates}")
        return _finish(run, begin)


def _finish(run: Run, begin: float) -> Path:
    folder = quote(str(run.folder))
    go_on = f"diffrl train --resume {folder}"
    with (
        disk.told(run.folder, f"Make room, then go on with: {go_on}"),
        StopSignals() as stop,
        RunLog(run.folder, run.log_size, run.update) as log,
    ):
        if not run.log_size:
            log.write(0, {"time/setup_seconds": time.perf_counter() - begin} | fit_metrics(run.reward))
        try:
            run.loop(log, stop)
        finally:  # a reward that breaks down must not cost what was learnt before it
            if processes.is_first() and run.guards.best is None:
                weights.save(run.policy, run.folder)
    if run.setup.dataset is not None:  # the classifier may be from the cache, and nobody told yet
        warn_of_unreadable(run.setup.dataset)
    minutes = (time.perf_counter() - begin) / 60
    if run.done:
        done = f"done in {minutes:.1f} minutes. Next: diffrl eval {folder}"
    else:
        done = f"stopped after update {run.update}. Go on with: {go_on}"
    console.print(f"[bold]{run.folder}[/]: {run.guards.said()}{done}")
    stop.reraise()
    return run.folder


def _folder(config: Config) -> Path:
    parts = [settings.chosen(config, group) for group in ("algo", "env", "reward")]
    folder = Path(config.root) / (config.name or "-".join([*parts, f"seed{config.seed}"]))
    if folder.exists() and config.resume != "auto":
        raise _is_there(folder)
    return folder


def _is_there(folder: Path) -> DiffRLError:
    return DiffRLError(
        f"{folder}: the run directory exists. Go on with it by resume=auto, give another with name=..., or "
        "delete it."
    )


def _sweep_drafts(folder: Path) -> None:
    """Delete what is left of a run's starts that were killed before it had its name; a live one is held."""
    for draft in folder.parent.glob(f".{folder.name}.draft-*"):
        with suppress(DiffRLError, OSError), lock.held(draft):
            shutil.rmtree(draft)


def _rename(draft: Path, folder: Path) -> None:
    """Give a new run its name, unless another process has begun one of that name meanwhile."""
    try:
        draft.rename(folder)
        disk.sync(folder.parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if folder.exists():
            raise _is_there(folder) from error
        raise
