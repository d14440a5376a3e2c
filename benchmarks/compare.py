"""Running a suite: every cell a training run in a process of its own, resumed, tuned, verified.

Each cell has a folder and a record in the suite's result, so that a suite goes on where it stopped: a cell
that is done for the same settings is not run again, whichever of the two is left of it.
"""

import copy
import functools
import json
import math
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffrl import __version__, config, disk, lock, settings_file, train
from diffrl.algorithms.untrained import Untrained
from diffrl.benchmarks import forks
from diffrl.benchmarks.provenance import provenance
from diffrl.benchmarks.suites import Cell, Suite
from diffrl.benchmarks.summary import first_of, several, spread, summarise
from diffrl.conflicts import check, check_new
from diffrl.errors import DiffRLError
from diffrl.log import console, evaluations, progress
from diffrl.settings_file import AT_A_TIME

_CELL_FILE = "cell.json"
_TRIAL_SEED = 1000  # no cell's: a row is not judged by the run that chose its value
Record = dict[str, Any]
"""What is known of a cell: its settings, measures and provenance."""


def compare(
    suite: Suite,
    folder: Path,
    *,
    words: list[str],
    seeds: int | None = None,
    jobs: int = 2,
    quick: bool = False,
    earlier: tuple[Sequence[Record], Sequence[Record]] = ((), ()),
    save: Callable[[list[Record], list[Record]], object] = lambda cells, trials: None,
) -> tuple[list[Record], list[Record]]:
    """Run every cell that is not done yet.

    Args:
        suite: what to run.
        folder: holds a folder of each cell, and is made if it is not there.
        words: further settings of every cell; none that a row or a cell sets itself, but for how many
            pictures are held at a time.
        seeds: instead of the suite's own number.
        jobs: cells at a time; they share the cores.
        quick: one seed, no tuning, and the suite's words for it: a look, not a result.
        earlier: of the suite's result, the records of its cells and trials; their folders may be gone.
        save: is given the records so far, of cells and trials, whenever one is done: none of `earlier` is
            lost that a new one has not replaced.

    Returns:
        The records of all cells, in the suite's order, and those of the trials that tuned them.
    """
    rows = _rows(suite, words, quick)
    _wanted([Cell(row, 0, chosen) for row, chosen in rows.items()], folder)  # before an hour of trials
    known, tried = earlier
    trials: list[Record] = []
    if not quick:
        rows, trials = _tuned(rows, suite, folder, jobs, tried, lambda found: save(list(known), found))
    number = seeds or (1 if quick else suite.seeds)
    # seed by seed: a suite that is stopped has something of every row
    cells = [Cell(row, seed, [*rows[row], f"seed={seed}"]) for seed in range(number) for row in rows]
    others = [record for record in known if record["row"] in rows]  # seeds that are not asked for
    others += [_failure(row, seed) for seed in range(number) for row in suite.rows if row not in rows]
    done = _run_all(cells, folder, jobs, known, lambda found: save(_merged(found, others), trials))
    return _merged(done, others), trials


def _rows(suite: Suite, words: list[str], quick: bool) -> dict[str, list[str]]:
    """Return the words of each row, without a seed.

    Raises:
        DiffRLError: the user's words set what the suite sets itself.
    """
    own = {"seed", "name", "root", *(config.key_of(word) for row in suite.rows.values() for word in row)}
    own |= set() if quick else {key for grid in suite.tune.values() for key in grid}
    own -= set(AT_A_TIME)  # of the machine
    for word in words:
        if config.key_of(word) in own:
            raise DiffRLError(
                f"{word}: the suite sets {config.key_of(word)} itself; change it in a suite of your own."
            )
    hurry = suite.quick if quick else {}
    return {
        row: [*suite.settings, *chosen, *hurry.get("all", []), *hurry.get(row, []), *words]
        for row, chosen in suite.rows.items()
    }


def _tuned(
    rows: dict[str, list[str]],
    suite: Suite,
    folder: Path,
    jobs: int,
    tried: Sequence[Record],
    save: Callable[[list[Record]], object],
) -> tuple[dict[str, list[str]], list[Record]]:
    """Run the trials; return the rows with the best value of each, without those whose trials all failed.

    The records of trials that the suite asks for no longer are kept, after the others.
    """
    alike = [*suite.tune_settings, f"seed={_TRIAL_SEED}"]
    cells = [
        Cell(f"{row} {word}", _TRIAL_SEED, [*rows[row], *alike, word])
        for row in suite.tune
        for word in suite.candidates(row)
    ]
    done = _run_all(cells, folder / "tune", jobs, tried, lambda found: save(_merged(found, tried)))
    trials = _merged(done, tried)
    tuned = dict(rows)
    for row in suite.tune:
        if best := _best(row, suite, trials):
            tuned[row] = [*rows[row], best]
        else:
            why = f"all its trials did; see the logs in {folder / 'tune'}"
            console.print(f"[bold red]{row} failed[/]: {why}")
            del tuned[row]
    return tuned, trials


def read(folder: Path, earlier: Sequence[Record] = ()) -> list[Record]:
    """Return the records of a suite's finished cells; of `earlier` ones, those whose folders are gone."""
    records = map(_record, sorted(folder.glob(f"*/{_CELL_FILE}")))
    return _merged([record for record in records if record], earlier)


def _best(row: str, suite: Suite, trials: list[Record]) -> str | None:
    """Return the `key=value` of a row whose trial was the best of those that did not fail; None if all did.

    Raises:
        DiffRLError: one has no number to be judged by.
    """
    words = {f"{row} {word}": word for word in suite.candidates(row)}
    finished = {
        words[trial["row"]]: trial for trial in trials if trial["row"] in words and "points" in trial
    }
    scores = {word: _score(trial, suite.tune_by) for word, trial in finished.items()}
    margin = suite.tune_margin
    if finished and suite.tune_least is not None and max(scores.values()) <= suite.tune_least:
        scores = {word: _score(trial, "eval/reward_mean") for word, trial in finished.items()}
        first = finished[max(scores, key=scores.__getitem__)]
        margin = _score(first, "eval/reward_std") / math.sqrt(_score(first, "eval/n"))
    alike = [word for word in scores if scores[word] >= max(scores.values()) - margin]
    # such as CLIPScore without a CLIP: then all that are alike are as good
    then = {word: _number(finished[word], suite.tune_then) or 0.0 for word in alike}
    return max(alike, key=lambda word: (then[word], scores[word]), default=None)


def _score(trial: Record, measure: str) -> float:
    score = _number(trial, measure)
    if score is None:
        said = trial["points"][-1].get(measure)
        raise DiffRLError(f"tune: {measure}: {said} in the trial {trial['row']!r}, no number.")
    return score


def _number(trial: Record, measures: str | list[str]) -> float | None:
    """Return what a trial measured in the end, of several the first that is a number."""
    found = (trial["points"][-1].get(measure) for measure in several(measures))
    return next((value for value in found if isinstance(value, int | float)), None)


def verify(suite: Suite, folder: Path, records: list[Record], choice: int) -> list[str]:
    """Run a finished cell once more and return what lies outside its row's 95% interval, a line each.

    Args:
        suite: whose columns are looked at.
        folder: of the suite's cells.
        records: of its cells, as `compare` returns them.
        choice: which of the finished cells, any number.

    Raises:
        DiffRLError: no cell is finished, or its words mean other settings now, or another version made it.
    """
    finished = [record for record in records if "points" in record]
    if not finished:
        raise DiffRLError(f"{folder}: no cell is finished; run 'diffrl compare' first.")
    stored = finished[choice % len(finished)]
    cell = Cell(stored["row"], stored["seed"], stored["words"])
    again = folder / "verify"
    _ours(stored, _settings(cell, again), f"{cell.name}: a record", "--root and --out")
    shutil.rmtree(again / cell.name, ignore_errors=True)
    console.print(f"running {cell.name} once more")
    (new,) = _run_all([cell], again, 1, threads=stored["threads"])
    if "points" not in new:
        return [f"{cell.name}: failed this time; see the log in {again}"]
    row = next(row for row in summarise("", finished) if row["method"] == cell.row)
    wrong = []
    now, then = spread(new["points"][-1]), spread(stored["points"][-1])
    for measures in suite.columns.values():
        measure = first_of(measures, row)
        if measure not in row or "seconds" in measure:  # time is the machine's
            continue
        value, before = now.get(measure), then[measure]
        margin = max(row[f"{measure}_ci95"] or 0.0, 1e-6 * abs(before))  # of one seed: the same number
        if not isinstance(value, int | float):  # such as a sentence that says what is not installed
            wrong.append(f"{cell.name}: {measure} is {value}, was {before:.4g}")
        elif not min(abs(value - row[measure]), abs(value - before)) <= margin:  # so that NaN counts
            wrong.append(
                f"{cell.name}: {measure} is {value:.4g}, was {before:.4g}, mean {row[measure]:.4g}"
            )
    return wrong


def _run_all(
    cells: list[Cell],
    folder: Path,
    jobs: int,
    earlier: Sequence[Record] = (),
    save: Callable[[list[Record]], object] = lambda done: None,
    threads: int | None = None,
) -> list[Record]:
    """Run the cells that are not done; return the records of all, in their order."""
    wanted = _wanted(cells, folder)
    records = {
        cell.name: _finished(cell, folder, wanted[cell.name]) or _known(cell, earlier, wanted[cell.name])
        for cell in cells
    }
    todo = [cell for cell in cells if records[cell.name] is None]
    now = provenance()
    folder.mkdir(parents=True, exist_ok=True)
    if done := len(cells) - len(todo):
        console.print(f"{done} of {len(cells)} cells are done already")
        for what in ("commit", "hardware"):
            others = {r[what] for r in records.values() if r} - {now[what]}
            if others:
                said = f"{', '.join(sorted(others))}; this is {now[what]}"
                console.print(f"[bold]some are of other {what}[/]: {said}")
    saving = threading.Lock()
    context = forks.server()
    threads = threads or max(torch.get_num_threads() // jobs, 1)  # of the cores that we may use
    origin = now | {"jobs": jobs, "threads": threads}
    with ThreadPoolExecutor(jobs) as pool, progress("cells", len(todo)) as bar:

        def finish(cell: Cell) -> None:
            process = context.Process(target=_run, args=(cell, wanted[cell.name], origin), daemon=True)
            process.start()
            process.join()
            if process.exitcode:
                why = f"exit code {process.exitcode}; see {folder / cell.name}.log"
                console.print(f"[bold red]{cell.name} failed[/]: {why}")
            with saving:
                found = _finished(cell, folder, wanted[cell.name])
                records[cell.name] = found or _failure(cell.row, cell.seed)
                save([record for record in records.values() if record])
                bar.advance(note=cell.name)

        list(pool.map(finish, todo))
    return [record for record in records.values() if record]


def _wanted(cells: list[Cell], folder: Path) -> dict[str, config.Config]:
    """Return what each cell trains with, by its name; every mistake in a suite shows here."""
    wanted = {cell.name: _settings(cell, folder) for cell in cells}
    if len(wanted) < len(cells):
        names = [cell.name for cell in cells]
        twice = [cell.row for cell in cells if names.count(cell.name) > 1]
        raise DiffRLError(f"rows: {' and '.join(map(repr, dict.fromkeys(twice)))} name the same folder.")
    return wanted


def _settings(cell: Cell, folder: Path) -> config.Config:
    """Return what a cell trains with; mistakes of settings that contradict each other show here."""
    settings = copy.deepcopy(_loaded(tuple(word for word in cell.words if config.key_of(word) != "seed")))
    settings.seed = cell.seed
    settings.root, settings.name, settings.resume = str(folder), cell.name, "auto"
    settings.dataset_workers = 0  # a cell is a daemon, to die with the suite, and may have no children
    check(settings)
    check_new(settings)
    return settings


@functools.lru_cache
def _loaded(words: tuple[str, ...]) -> config.Config:
    """Return the settings of a row: Hydra takes a tenth of a second, and its seeds differ in one number."""
    return config.load(list(words))


def _run(cell: Cell, settings: config.Config, origin: dict[str, Any]) -> None:
    """Train one cell; what it prints, its traceback too, goes to a file beside its folder."""
    folder = Path(settings.root)
    with (folder / f"{cell.name}.log").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(origin["threads"])
    _drop_other(folder / cell.name, settings)
    begin = time.perf_counter()
    trained = train.train(settings)
    if not train.is_done(trained):  # a signal to the suite has stopped its cells as well
        raise SystemExit(
            f"{trained}: stopped before its end; the suite goes on with it when it is run again."
        )
    record = asdict(cell) | {
        "command": shlex.join(["diffrl", "train", *cell.words]),
        "minutes": (time.perf_counter() - begin) / 60,
        "points": list(evaluations(trained)),
        "settings": settings_file.facts(settings),
    }
    with disk.replacing(trained / _CELL_FILE) as draft:
        draft.write_text(json.dumps(record | origin))


def _drop_other(folder: Path, settings: config.Config) -> None:
    """Delete a run that was stopped on its way, unless it has these settings and can be resumed.

    Raises:
        DiffRLError: a process is writing to it.
    """
    try:
        resumable = train.is_of(folder, settings)
    except DiffRLError:  # there is none, or it is of another version
        resumable = False
    if folder.is_dir() and not resumable:
        with lock.held(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _record(path: Path) -> Record | None:
    """Return the record in a file; None if there is none, or it is cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _finished(cell: Cell, folder: Path, wanted: config.Config) -> Record | None:
    """Return the record of a cell that has run to its end; None if not, or if its record is cut short."""
    record = _record(folder / cell.name / _CELL_FILE)
    where = f"{folder / cell.name}: a finished run"
    return _ours(record, wanted, where, "--root, or delete it") if record else None


def _known(cell: Cell, earlier: Sequence[Record], wanted: config.Config) -> Record | None:
    """Return the record of a cell among `earlier` ones, if it ran to its end there."""
    of_it = [r for r in earlier if (r["row"], r["seed"]) == (cell.row, cell.seed) and "points" in r]
    what = f"{cell.name}: the suite's result holds it, but"
    return _ours(of_it[0], wanted, what, "--out, or move the result away") if of_it else None


def _failure(row: str, seed: int) -> Record:
    return {"row": row, "seed": seed, "failed": True}


def _ours(record: Record, wanted: config.Config, what: str, fix: str) -> Record:
    """Return the record.

    Raises:
        DiffRLError: it is of other settings (presets count) or of another version.
    """
    if (then := record.get("version")) != __version__:
        raise DiffRLError(f"{what} of diffrl {then}, and this is {__version__}. Give another {fix}.")
    changed = settings_file.changed(record.get("settings", {}), settings_file.facts(wanted))
    if isinstance(wanted.algo, Untrained):  # its adapters stay zero, wherever they are
        changed = {name: pair for name, pair in changed.items() if not name.startswith("policy.")}
    if changed:
        name, (was, now) = next(iter(changed.items()))
        raise DiffRLError(
            f"{what} of other settings: {name} was {was}, and is {now} now. Give another {fix}."
        )
    return record


def _merged(records: list[Record], earlier: Sequence[Record]) -> list[Record]:
    """Return `records`, and those of `earlier` that are of none of their cells."""
    cells = {(record["row"], record["seed"]) for record in records}
    return [*records, *(r for r in earlier if (r["row"], r["seed"]) not in cells)]
