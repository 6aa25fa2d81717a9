"""Check a staged release before it is published.

python hub/verify.py NAME.TAG [--data-dir DIR | --measure]

Checks the files and their sha256, the model against its golden output, the card against its data and, where the data
are available, the accuracy against results.json. Findings go to verified.json, without which publish.py refuses.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from card import render
from folder import (
    CARD,
    GOLDEN,
    HERE,
    RECIPE,
    RESULTS,
    STAMP,
    Staged,
    is_registered,
    read_releases,
    write_json,
)
from measure import measure

from ride_timm import InputError
from ride_timm.cli.process import exit_code
from ride_timm.data.datasets import EMBEDDED
from ride_timm.evaluation.tables import GROUPS, number
from ride_timm.hardware import set_threads
from ride_timm.models import Ride
from ride_timm.models.release import CONFIG, WEIGHTS
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import provenance

TOLERANCE = 1e-3  # of logits of order 10, between machines
_MEASURED = (CONFIG, WEIGHTS, RESULTS, RECIPE)  # the files on which a measured accuracy depends
POINTS = 0.1  # of accuracy, in percentage points


@torch.inference_mode()
def check_golden(model: Ride, path: Path) -> float:
    """The largest difference from the golden output; InputError where it exceeds the tolerance."""
    try:
        golden = safetensors.torch.load_file(path)
        outputs = {"output": model(golden["input"])}
        if "routed_output" in golden:
            if model.router is None:
                raise InputError(f"{path} has routed outputs, the model has no router.")
            outputs["routed_output"], used = model.forward_routed(golden["input"])
            if not torch.equal(used, golden["experts_used"]):
                raise InputError(f"the golden input uses {used.tolist()} experts, "
                                 f"{path} states {golden['experts_used'].tolist()}.")  # fmt: skip
        difference = max((golden[key] - value).abs().max().item() for key, value in outputs.items())
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a golden pair of this model ({type(error).__name__}: {error}).") from error
    if not difference <= TOLERANCE:
        raise InputError(f"the golden output differs by {difference:.2g}, expected at most {TOLERANCE:g}: "
                         "weights, config.json or code have changed since the release was staged.")  # fmt: skip
    return difference


def check_accuracy(model: Ride, recipe: Recipe, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measure again: {stage: {"all", "stated"}}; InputError where results.json states something else."""
    measured = measure(model, recipe, curve=False)
    if results.get("class_counts") not in (None, measured["class_counts"]):
        raise InputError("the data are not those of results.json: the class counts differ.")
    found = {}
    for stage, stated in results["stages"].items():
        if stage == "experts" and "heads" in results["stages"]:
            continue  # measured before the heads that the release holds
        if stage not in measured["stages"]:
            raise InputError(f"results.json has metrics of {stage}, the model has no router.")
        now = measured["stages"][stage]
        for group in GROUPS:
            here, there = now[group], stated[group]  # None: no class of this group has test images
            if (here is None) != (there is None) or (here is not None and not abs(here - there) <= POINTS):
                raise InputError(f"{stage}, {group}: measured {number(here)} %, "
                                 f"results.json states {number(there)} %.")  # fmt: skip
        found[stage] = dict(all=now["all"], stated=stated["all"])
    return found


def verify(staged: Staged, data: Recipe | None = None) -> dict[str, Any]:
    """Run all checks and write verified.json, which is returned; InputError at the first that fails.

    data: the recipe of the test set to measure on. Without it, the accuracy that was measured earlier is kept, unless a
    file on which it depends has changed.
    """
    before = staged.stamp()
    (staged.path / STAMP).unlink(missing_ok=True)
    hashes = staged.hashes()
    config, results = staged.json(CONFIG), staged.json(RESULTS)
    if config.get("sha256") != hashes[WEIGHTS]:
        raise InputError(f"{staged.path}: {WEIGHTS} does not have the sha256 that {CONFIG} states.")
    if staged.path.parent == HERE and is_registered(staged.name):
        recorded = read_releases().get(staged.name, {}).get("sha256")
        if recorded != hashes[WEIGHTS]:
            raise InputError(f"the package records sha256 {recorded}, {WEIGHTS} has {hashes[WEIGHTS]}: stage it again.")
    model = timm.create_model(f"local-dir:{staged.path}", pretrained=True).eval()
    name = f"{config['architecture']}.{config['pretrained_cfg'].get('tag')}"
    if not isinstance(model, Ride) or name != staged.name:
        raise InputError(f"{staged.path} holds {name}, expected {staged.name}.")
    check_paths(staged.recipe(), results, staged.path)
    difference = check_golden(model, staged.path / GOLDEN)
    if (staged.path / CARD).read_bytes() != render(staged).encode():
        raise InputError(f"{staged.path / CARD} is not the card of its data: python hub/card.py {staged.name}")
    found = dict(files=hashes, golden=float(f"{difference:.2g}"), measured=None, versions=provenance()["versions"])
    if data is not None:
        found["measured"] = check_accuracy(model, data, results)
    elif before.get("measured") and all(before["files"].get(file) == hashes.get(file) for file in _MEASURED):
        found["measured"] = before["measured"]
        then = before.get("measured_with", before.get("versions"))
        found |= dict(measured_with=then) if then != found["versions"] else {}
    write_json(staged.path / STAMP, found)
    return found


def check_paths(recipe: Recipe | None, results: dict[str, Any], folder: Path) -> None:
    """InputError for a release whose recipe, source or teacher names a local path."""
    if recipe is not None and recipe.on_disk:
        paths = ", ".join(f"{key}={value!r}" for key, value in recipe.on_disk.items())
        raise InputError(f"{folder / RECIPE} names local data ({paths}).")
    for key, spec in (("source", results.get("source")), ("teacher", (results.get("teacher") or {}).get("spec"))):
        if spec is not None and not (spec.startswith("hf-hub:") or is_registered(spec)):
            raise InputError(f"{folder / RESULTS}: {key}={spec!r}: expected a release (NAME.TAG or hf-hub:…) or null.")


def data_of(staged: Staged, data_dir: str | None, measured: bool, recipe: str | None = None) -> Recipe | None:
    """The recipe of the test set to measure on; None where data are neither asked for nor embedded."""
    found = load_recipe(recipe) if recipe is not None else staged.recipe()
    if found is None and (data_dir or measured):
        raise InputError(f"{staged.path} has no {RECIPE}: name the --recipe of the data, such as cifar100_lt.")
    if found is None or not (data_dir or measured or found.dataset in EMBEDDED):
        return None
    return dataclasses.replace(found, data_dir=data_dir)


def print_findings(staged: Staged, found: dict[str, Any], measured_now: bool) -> None:
    print(f"{staged.path}: {len(found['files'])} files, golden output within {found['golden']:g}")
    when = "measured" if measured_now else "measured earlier"
    for stage, accuracy in (found["measured"] or {}).items():
        print(f"{stage}: {accuracy['all']:.2f} % {when}, {accuracy['stated']:.2f} % stated")
    if found["measured"] is None:
        print("accuracy not measured: verify.py does so with --data-dir, or with --measure and the data of the Hub")
    print("verified")


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG")
    parser.add_argument("--data-dir", metavar="DIR", help="measure on the data in this folder")
    parser.add_argument("--measure", action="store_true", help="measure on the recipe's data, read from the Hub")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="recipe with the data of a converted checkpoint")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    set_threads(None)
    staged = Staged.find(args.name, args.root)
    data = data_of(staged, args.data_dir, args.measure, args.recipe)
    print_findings(staged, verify(staged, data), data is not None)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
