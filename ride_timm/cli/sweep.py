"""Train recipes with several seeds one after another, into one table."""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..evaluation.tables import GROUPS, STAGE_NAMES, markdown_table, millions, number
from ..files import write_text
from ..training.arguments import Parser, add_flags, flags_given
from ..training.options import check_effect
from ..training.recipe import load_recipe
from ..training.run_folder import RunFolder
from .process import end_with_parent, print_json

METRICS = (*GROUPS, "top5", "class_mean")
_SET_BY_SWEEP = ("seed", "name")
_IN_RUN = end_with_parent if sys.platform == "linux" else None  # Windows knows no function there
_SCRIPT_FLAGS = ("--stage", "--from", "--teacher", "--tracker", "--threads")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("sweep", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--recipes", nargs="+", required=True, metavar="NAME|FILE", help="recipes to train")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of every recipe (default: 0)"
    )
    parser.add_argument(
        "--output",
        default="runs/sweep",
        metavar="DIR",
        help="folder of the runs and the table; a sweep in it is resumed",
    )
    parser.add_argument("--script", metavar="FILE", help="training script (default: train_accelerate.py)")
    parser.add_argument("--config", metavar="FILE", help="launch with this configuration of accelerate")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of the training script for every run")


def run(args: argparse.Namespace) -> None:
    if not all(seed >= 0 for seed in args.seeds) or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"seeds {' '.join(map(str, args.seeds))}: expected different whole numbers, 0 or more.")
    if args.config is not None and not Path(args.config).is_file():
        raise InputError(f"config {args.config}: no such file; `accelerate config` writes one.")
    script, output = find_script(args.script), Path(args.output)
    check_flags(args.recipes, args.flags)
    if output.is_file():
        raise InputError(f"output {output} is a file: pass a folder.")
    try:
        run_all(args.recipes, args.seeds, output, script, args.flags, args.config)
    finally:
        rows = collect(output, args.recipes, args.seeds)
        if args.json:
            print_json(rows)
        elif rows:
            print(f"{to_markdown(rows)}\nin {output / 'results.md'} and results.csv")


def find_script(path: str | None) -> Path:
    """The script given, else one in the working directory or next to the package."""
    paths = [Path(path)] if path else [Path("train_accelerate.py"), Path(__file__).parents[2] / "train_accelerate.py"]
    for candidate in paths:
        if candidate.is_file():
            return candidate
    raise InputError(f"no training script at {' or '.join(map(str, paths))}: pass train_accelerate.py by --script.")


def check_flags(recipes: Sequence[str], flags: Sequence[str]) -> None:
    """InputError for flags that one of the runs would refuse."""
    parser = Parser(prog="flags of the runs", add_help=False, allow_abbrev=False)
    for flag in _SCRIPT_FLAGS:
        parser.add_argument(flag)
    add_flags(parser)
    args = parser.parse_args(flags)
    values = flags_given(args)
    if taken := [name for name in _SET_BY_SWEEP if name in values]:
        raise InputError(f"--{taken[0]} is set by the sweep: pass seeds by --seeds and names by --recipes.")
    if len({Path(recipe).stem for recipe in recipes}) < len(recipes):
        raise InputError(f"recipes {', '.join(recipes)}: two of the same name would write to the same folders.")
    for name in recipes:
        recipe = load_recipe(name).override(values)
        check_effect(values, recipe, getattr(args, "from"))
        if args.stage == "router":
            continue
        rebalances = recipe.decouple != "none" and getattr(args, "from")
        if recipe.distillation and not rebalances and not args.teacher:
            raise InputError(f"recipe {name} learns from a teacher: pass one after `--`, by --teacher.")


def run_all(
    recipes: Sequence[str], seeds: Sequence[int], output: Path, script: Path, flags: Sequence[str], config: str | None
) -> None:
    """Train every recipe with every seed, resuming unfinished runs.

    Writes results.md and results.csv after each run.
    config: a configuration of `accelerate launch`; None runs the script by this Python. A run that fails does not stop
    the others: RunError names it at the end. InputError for a run that is refused, or that ends before it begins.
    """
    launcher = [sys.executable]
    if config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config]
    failed = []
    for seed in seeds:  # every recipe once before any of them twice: a table early
        for recipe in recipes:
            folder = _folder(output, recipe, seed)
            print(f"{folder}: {recipe}, seed {seed}", file=sys.stderr)
            own = ["--recipe", recipe, "--seed", str(seed), "--output", str(folder), "--resume"]
            command = [*launcher, str(script), *own, *flags]
            code = subprocess.run(command, preexec_fn=_IN_RUN).returncode
            # launchers turn every exit code into 1; a run that has begun has a recipe.yaml
            if code == 2 or (code and config is not None and not RunFolder(folder).occupied):
                raise InputError(f"{folder} was refused, see above.")
            if code:
                failed.append(folder.name)
            write_tables(output, recipes, seeds, flags)
    if failed:
        raise RunError(f"{', '.join(failed)} failed, see above; the same command tries again.")


def _folder(output: Path, recipe: str, seed: int) -> Path:
    return output / f"{Path(recipe).stem}-seed{seed}"


def _results(output: Path, recipe: str, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The results.json of a recipe's runs by seed, where there is one."""
    folders = {seed: RunFolder(_folder(output, recipe, seed)) for seed in seeds}
    return {seed: folder.results() for seed, folder in folders.items() if (folder.path / "results.json").is_file()}


def collect(output: Path, recipes: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Means and sample standard deviations over seeds, a row per recipe and stage."""
    rows = []
    for recipe in recipes:
        results = _results(output, recipe, seeds)
        for stage in STAGE_NAMES:
            done = {seed: found["stages"][stage] for seed, found in results.items() if stage in found["stages"]}
            if done:
                row: dict[str, Any] = dict(recipe=Path(recipe).stem, stage=stage, seeds=list(done))
                for name in METRICS:
                    values = [metrics[name] for metrics in done.values() if metrics.get(name) is not None]
                    row[name] = statistics.mean(values) if values else None
                    row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
                row["macs"] = round(statistics.mean(metrics["macs"] for metrics in done.values()))
                row["epochs"] = statistics.mean(metrics["epochs"] for metrics in done.values())
                row["seconds"] = statistics.mean(results[seed]["seconds"] for seed in done)
                rows.append(row)
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV at full precision; an empty cell was not measured."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(row | dict(seeds=" ".join(map(str, row["seeds"]))) for row in rows)
    return text.getvalue()


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table: means, and deviations over several seeds."""

    def cell(row: dict[str, Any], name: str) -> str:
        spread = row[f"{name}_std"]
        return number(row[name]) + (f" ± {spread:.2f}" if spread is not None else "")

    metrics = [name for name in METRICS if name != "class_mean"]
    lines = [["recipe", "stage", *metrics, "MMACs", "epochs", "seeds", "seconds"]]
    for row in rows:
        cells = [row["recipe"], row["stage"], *(cell(row, name) for name in metrics), millions(row["macs"])]
        lines.append([*cells, f"{row['epochs']:g}", ", ".join(map(str, row["seeds"])), f"{row['seconds']:.0f}"])
    return markdown_table(lines)


def write_tables(output: Path, recipes: Sequence[str], seeds: Sequence[int], flags: Sequence[str]) -> None:
    """Write results.md and results.csv of what has finished, if anything has."""
    rows = collect(output, recipes, seeds)
    if rows:
        text = f"{to_markdown(rows)}\n\n{_provenance(output, recipes, seeds, flags)}\n"
        write_text(output / "results.md", text)
        write_text(output / "results.csv", to_csv(rows))


def _provenance(output: Path, recipes: Sequence[str], seeds: Sequence[int], flags: Sequence[str]) -> str:
    """Provenance of the numbers: flags, commit, device, precision and versions."""
    results = [found for recipe in recipes for found in _results(output, recipe, seeds).values()]

    def distinct(values: list[str]) -> str:
        return ", ".join(sorted(set(values)))

    given = f"Flags of every run: `{shlex.join(flags)}`." if flags else "No flags besides the recipes."
    return f"""{given}
Mean ± sample standard deviation over seeds; accuracies in percent; MACs per image; seconds of training and evaluation.
Commit {distinct([str(found["commit"]) for found in results])}; {distinct([found["device"] for found in results])}; \
precision {distinct([found["precision"] for found in results])}; \
torch {distinct([found["versions"]["torch"] for found in results])}, \
timm {distinct([found["versions"]["timm"] for found in results])}."""
