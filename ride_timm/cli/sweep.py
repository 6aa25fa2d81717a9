"""Several recipes and seeds one after another, resumable, and one table of their means and spreads."""

from __future__ import annotations

import csv
import io
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..evaluation.tables import GROUPS, markdown_table, millions
from ..files import write_atomically
from ..training.arguments import Parser, add_flags, flags_given
from ..training.recipe import load_recipe
from ..training.run_folder import RunFolder
from .commands import print_json
from .process import Interrupted

MEASURES = (*GROUPS, "top5", "class_mean")
_OWN = ("seed", "name")  # the sweep's to decide
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 60  # seconds for a run to end after its step
_SCRIPT_FLAGS = ("--stage", "--from", "--teacher", "--tracker", "--threads")


def find_script(path: str | None) -> Path:
    """The training script: as named, in the current folder, or beside the package; InputError where there is none."""
    places = [Path(path)] if path else [Path("train_accelerate.py"), Path(__file__).parents[2] / "train_accelerate.py"]
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"no training script at {' or '.join(map(str, places))}: name train_accelerate.py by --script.")


def check_flags(recipes: Sequence[str], flags: Sequence[str]) -> None:
    """InputError for a flag that a run would refuse, before any of them begins."""
    parser = Parser(prog="flags of the runs", add_help=False, allow_abbrev=False)
    for flag in _SCRIPT_FLAGS:
        parser.add_argument(flag)
    add_flags(parser)
    given = parser.parse_args(flags)
    values, given = flags_given(given), vars(given)
    if taken := [name for name in _OWN if name in values]:
        raise InputError(f"--{taken[0]} is the sweep's to give: seeds by --seeds, names by --recipes.")
    if len({Path(recipe).stem for recipe in recipes}) < len(recipes):
        raise InputError(f"recipes {', '.join(recipes)}: two of one name would share their folders.")
    for name in recipes:
        recipe = load_recipe(name).override(values)
        if given["stage"] == "router":
            continue
        if recipe.decouple != "none" and not given["from"]:
            raise InputError(f"recipe {name} re-balances a trained network: name one behind `--`, by --from.")
        if recipe.distillation and recipe.decouple == "none" and not given["teacher"]:
            raise InputError(f"recipe {name} learns from a teacher: name one behind `--`, by --teacher.")


def run_all(
    recipes: Sequence[str], seeds: Sequence[int], output: Path, script: Path, flags: Sequence[str], config: str | None
) -> None:
    """Every recipe with every seed in `output`, going on where a run was left; results.md and results.csv after each.

    config: a configuration of `accelerate launch`; None runs the script with this Python alone. A run that fails does
    not keep the others from theirs: RunError names those that did at the end. InputError for a run that is refused,
    or that a launcher ends before it has begun.
    """
    launcher = [sys.executable]
    if config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config]
    failed = []
    for seed in seeds:  # every recipe once before any of them twice: a table early
        for recipe in recipes:
            folder = output / f"{Path(recipe).stem}-seed{seed}"
            print(f"{folder}: {recipe}, seed {seed}", file=sys.stderr)
            own = ["--recipe", recipe, "--seed", str(seed), "--output", str(folder), "--resume"]
            code = _run([*launcher, str(script), *own, *flags])
            # launchers make a 1 of every code; a run that can begin writes down its recipe
            if code == 2 or (code and config is not None and not RunFolder(folder).occupied):
                raise InputError(f"{folder} was refused, for the reason above.")
            if code:
                failed.append(folder.name)
            write_tables(output, recipes, seeds, flags)
    if failed:
        raise RunError(f"{', '.join(failed)} failed, see above; the same command tries again.")


def _run(command: list[str]) -> int:
    """The exit code of a run that is told of the signals sent to this process, and of which nothing is left then.

    A run is a session of its own. Accelerate's launcher of one process dies of a signal without passing it on, and what
    it leaves behind can be found by their group alone. So the terminal's signals come to a run only from here.
    """
    caught: list[int] = []
    process: subprocess.Popen | None = None

    def forward(number: int, frame: Any) -> None:
        caught.append(number)
        if process is not None:
            process.send_signal(_told(number))

    # nohup has SIGHUP ignored, which stays so
    numbers = [number for number in _PASSED_ON if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        if caught:  # while it was started
            process.send_signal(_told(caught[0]))
        code = process.wait()
        if code or caught:
            _end(process.pid, _told(caught[0]) if caught else signal.SIGTERM)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        raise Interrupted(caught[0], "interrupted; the same command goes on after the last finished epoch.")
    return code


def _told(number: int) -> int:
    """What a run is sent for a signal: of a closed terminal's it would die within a step."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _end(group: int, number: int) -> None:
    """Pass a signal to whoever is left of a process group and wait until nobody is: two runs never share a folder.

    A run ends after its step. Whoever is longer at it is killed, which the files of a run survive.
    """
    for sent, seconds in ((number, _PATIENCE), (signal.SIGKILL, 5)):
        until = time.monotonic() + seconds
        try:
            os.killpg(group, sent)
            while time.monotonic() < until:
                time.sleep(0.05)
                with suppress(ChildProcessError):
                    os.waitpid(-group, os.WNOHANG)  # orphans are ours to bury where this is a container's first process
                os.killpg(group, 0)
        except OSError:  # nobody
            return


def collect(output: Path, recipes: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a recipe and stage: means and sample standard deviations over the seeds that have finished it."""
    rows = []
    for recipe in recipes:
        folders = {seed: RunFolder(output / f"{Path(recipe).stem}-seed{seed}") for seed in seeds}
        found = {seed: folder.results() for seed, folder in folders.items() if (folder.path / "results.json").is_file()}
        for stage in ("experts", "router"):
            done = {seed: results["stages"][stage] for seed, results in found.items() if stage in results["stages"]}
            if done:
                row: dict[str, Any] = dict(recipe=Path(recipe).stem, stage=stage, seeds=list(done))
                for name in MEASURES:
                    values = [metrics[name] for metrics in done.values() if metrics.get(name) is not None]
                    row[name] = statistics.mean(values) if values else None
                    row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
                row["macs"] = round(statistics.mean(metrics["macs"] for metrics in done.values()))
                row["epochs"] = statistics.mean(metrics["epochs"] for metrics in done.values())
                row["seconds"] = statistics.mean(found[seed]["seconds"] for seed in done)
                rows.append(row)
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV, at full precision; an empty cell is what was not measured."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(row | dict(seeds=" ".join(map(str, row["seeds"]))) for row in rows)
    return text.getvalue()


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table: mean, and spread where there is more than one seed; accuracies in percent."""

    def cell(row: dict[str, Any], name: str) -> str:
        if row[name] is None:
            return "–"
        spread = row[f"{name}_std"]
        return f"{row[name]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")

    measures = [name for name in MEASURES if name != "class_mean"]
    head = ["recipe", "stage", *measures, "MMACs", "epochs", "seeds", "seconds"]
    lines = [head]
    for row in rows:
        cells = [row["recipe"], row["stage"], *(cell(row, name) for name in measures)]
        cells += [millions(row["macs"]), f"{row['epochs']:g}", ", ".join(map(str, row["seeds"]))]
        lines.append([*cells, f"{row['seconds']:.0f}"])
    return markdown_table(lines) + "\n"


def write_tables(output: Path, recipes: Sequence[str], seeds: Sequence[int], flags: Sequence[str]) -> str | None:
    """Write results.md and results.csv of what has finished; gives the Markdown, None where nothing has."""
    rows = collect(output, recipes, seeds)
    if not rows:
        return None
    text = to_markdown(rows) + "\n" + _circumstances(output, recipes, seeds, flags)
    write_atomically(output / "results.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    write_atomically(output / "results.csv", lambda partial: partial.write_text(to_csv(rows), encoding="utf-8"))
    return text


def _circumstances(output: Path, recipes: Sequence[str], seeds: Sequence[int], flags: Sequence[str]) -> str:
    """What the numbers depend on, as far as the runs wrote it down: a figure without it is a rumour."""
    paths = [output / f"{Path(recipe).stem}-seed{seed}" / "results.json" for recipe in recipes for seed in seeds]
    found = [RunFolder(path.parent).results() for path in paths if path.is_file()]

    def distinct(values: list[str]) -> str:
        return ", ".join(sorted(set(values)))

    lines = [f"Flags of every run: `{shlex.join(flags)}`." if flags else "No flags beside the recipes."]
    lines.append("Mean ± sample standard deviation over seeds; accuracies in percent; MACs per image; seconds of "
                 "training and evaluation, all stages.")  # fmt: skip
    lines.append(f"Commit {distinct([str(results['commit']) for results in found])}; "
                 f"{distinct([results['device'] for results in found])}; "
                 f"precision {distinct([results['precision'] for results in found])}; "
                 f"torch {distinct([results['versions']['torch'] for results in found])}, "
                 f"timm {distinct([results['versions']['timm'] for results in found])}.")  # fmt: skip
    return "\n".join(lines) + "\n"


def sweep_command(args: Any) -> None:
    """python -m ride_timm sweep"""
    if not all(seed >= 0 for seed in args.seeds) or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"seeds {' '.join(map(str, args.seeds))}: expected different whole numbers, 0 or more.")
    if args.config is not None and not Path(args.config).is_file():
        raise InputError(f"config {args.config}: no such file; accelerate's own `accelerate config` makes one.")
    script, output = find_script(args.script), Path(args.output)
    check_flags(args.recipes, args.flags)
    if output.is_file():
        raise InputError(f"output {output} is a file: name a folder.")
    try:
        run_all(args.recipes, args.seeds, output, script, args.flags, args.config)
    finally:
        rows = collect(output, args.recipes, args.seeds)
        if args.json:
            print_json(rows)
        elif rows:
            print(to_markdown(rows) + f"in {output / 'results.md'} and results.csv")
