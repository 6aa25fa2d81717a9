"""Merge the adapters of a run into its experts' weights, as a new folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation.evaluate import with_macs
from ..files import new_folder, write_text
from ..inference.load import SPEC, folder_of, load_ride, own_recipe
from ..models.release import DATA_CONFIG
from ..models.ride_any import AnyRide
from ..training.run_folder import RunFolder
from .process import print_files


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("merge", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="SPEC", help=SPEC)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> None:
    folder, source = Path(args.output), folder_of(args.model)
    if folder.exists():
        raise InputError(f"output {folder} exists: name a new folder.")
    model = load_ride(args.model, routed=False)
    if not isinstance(model, AnyRide) or not model.has_adapters:
        raise InputError(f"model {args.model!r} has no adapters: it needs no merging.")
    model.merge_adapters()
    with new_folder(folder) as partial:
        _write(model, partial, source)
    print_files(folder, args.json)


def _write(model: AnyRide, folder: Path, source: Path) -> None:
    """Write the weights, and the run's recipe and results with the MACs of the merged network."""
    cfg = model.pretrained_cfg
    RunFolder(folder).export(model, {key: cfg[key] for key in DATA_CONFIG}, tuple(cfg.get("label_names") or ()))
    if recipe := own_recipe(str(source)):
        write_text(folder / "recipe.yaml", dataclasses.replace(recipe, adapter=None).to_yaml())
    if (source / "metrics.csv").is_file():
        shutil.copyfile(source / "metrics.csv", folder / "metrics.csv")
    if (source / "results.json").is_file():
        results = RunFolder(source).results()
        for of_the_adapters in ("network", "routing", "examples"):  # of a release: its MACs, and files left behind
            results.pop(of_the_adapters, None)
        stages = {name: with_macs(row, model, tuple(cfg["input_size"])) for name, row in results["stages"].items()}
        write_text(folder / "results.json", json.dumps(results | dict(stages=stages), indent=2) + "\n")
