"""Check a staged release before it may be published.

python hub/verify.py NAME.TAG [--data-dir DIR | --measure]

Files and sha256, the model through `timm.create_model("local-dir:…")` against the golden output, the card against its
data, and, where the data are at hand, the accuracy against results.json. What was found is written into verified.json,
without which hub/publish.py refuses the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from card import hand_edited, render
from measure import measure
from staged import CARD, GOLDEN, HERE, RECIPE, RESULTS, STAMP, Staged, is_registered, read_table

from ride_timm import InputError
from ride_timm.cli.process import exit_code
from ride_timm.data.datasets import EMBEDDED
from ride_timm.hardware import set_threads
from ride_timm.models import Ride
from ride_timm.models.release import CONFIG, WEIGHTS
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import provenance

TOLERANCE = 1e-3  # of logits of order 10, between machines
POINTS = 0.1  # of accuracy, in percentage points


@torch.inference_mode()
def check_golden(model: Ride, path: Path) -> float:
    """The largest difference from the golden output; InputError where it is above the tolerance."""
    try:
        golden = safetensors.torch.load_file(path)
        wanted = {"output": model(golden["input"])}
        if "routed_output" in golden:
            if model.router is None:
                raise InputError(f"{path} has routed answers, the model has no router.")
            wanted["routed_output"], used = model.forward_routed(golden["input"])
            if not torch.equal(used, golden["experts_used"]):
                raise InputError(f"the experts used on the golden input are {used.tolist()}, "
                                 f"{path} says {golden['experts_used'].tolist()}.")  # fmt: skip
        difference = max((golden[key] - value).abs().max().item() for key, value in wanted.items())
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is no golden pair of this model ({type(error).__name__}: {error}).") from error
    if not difference <= TOLERANCE:
        raise InputError(f"the golden output differs by {difference:.2g}, expected at most {TOLERANCE:g}: "
                         "weights, configuration or code are not those that were staged.")  # fmt: skip
    return difference


def check_accuracy(model: Ride, recipe: Recipe, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measured again: {stage: {"all", "stated"}}; InputError where it is not what results.json states."""
    found = {}
    measured = measure(model, recipe)
    if results.get("class_counts") not in (None, measured["class_counts"]):
        raise InputError("these are not the data of results.json: the training images by class differ.")
    for stage, stated in results["stages"].items():
        if stage not in measured["stages"]:
            raise InputError(f"results.json has figures of {stage}, the model has no router.")
        now = measured["stages"][stage]
        for group in ("all", "many", "medium", "few"):
            if _differ(now[group], stated[group]):
                raise InputError(
                    f"{stage}, {group}: measured {_percent(now[group])}, results.json says {_percent(stated[group])}."
                )
        found[stage] = dict(all=now["all"], stated=stated["all"])
    return found


def _differ(now: float | None, stated: float | None) -> bool:
    """Whether an accuracy is another than the stated one; None: no class of the group has test images."""
    if now is None or stated is None:
        return now is not stated
    return not abs(now - stated) <= POINTS


def _percent(accuracy: float | None) -> str:
    return "no images" if accuracy is None else f"{accuracy:.2f} %"


def verify(staged: Staged, data: Recipe | None = None) -> dict[str, Any]:
    """All checks; what they found, which is also written into the folder. InputError at the first that fails.

    data: the recipe of the test set to measure on; None: no accuracy is measured, and what was measured before of the
    very same files stays.
    """
    before = staged.stamp()
    (staged.path / STAMP).unlink(missing_ok=True)
    hashes = staged.hashes()
    config, results = staged.json(CONFIG), staged.json(RESULTS)
    if config.get("sha256") != hashes[WEIGHTS]:
        raise InputError(f"{staged.path}: {WEIGHTS} is not the file whose sha256 {CONFIG} states.")
    if staged.path.parent == HERE and is_registered(staged.name):
        beside = read_table().get(staged.name, {}).get("sha256")
        if beside != hashes[WEIGHTS]:
            raise InputError(
                f"the sha256 beside the tag's cfg is {beside}, that of {WEIGHTS} {hashes[WEIGHTS]}: stage again."
            )
    model = timm.create_model(f"local-dir:{staged.path}", pretrained=True).eval()
    name = f"{config['architecture']}.{config['pretrained_cfg'].get('tag')}"
    if not isinstance(model, Ride) or name != staged.name:
        raise InputError(f"{staged.path} holds {name}, its name says {staged.name}.")
    if (recipe := staged.recipe()) is not None:
        check_recipe(recipe, staged.path / RECIPE)
    check_source(results.get("source"), staged.path / RESULTS)
    difference = check_golden(model, staged.path / GOLDEN)
    card = staged.card()
    if card != render(staged, hand_edited(card)):
        raise InputError(f"{staged.path / CARD} says something else than its data, outside the section for editing: "
                         f"python hub/card.py {staged.name}")  # fmt: skip
    found = dict(files=hashes, golden=float(f"{difference:.2g}"), measured=None, versions=provenance()["versions"])
    if data is not None:
        found["measured"] = check_accuracy(model, data, results)
    elif before.get("files") == hashes and before.get("measured"):
        found["measured"] = before["measured"]
        then = before.get("measured_with", before.get("versions"))
        found |= dict(measured_with=then) if then != found["versions"] else {}
    (staged.path / STAMP).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def check_recipe(recipe: Recipe, where: Path) -> None:
    """InputError for a recipe of a release that names places on a disk: it may only name what everybody has."""
    if recipe.on_disk:
        places = ", ".join(f"{key}={value!r}" for key, value in recipe.on_disk.items())
        raise InputError(f"{where} names data on a disk ({places}).")


def check_source(source: str | None, where: Path) -> None:
    """InputError for a release that says it began from what others cannot find."""
    if source is not None and not (source.startswith("hf-hub:") or is_registered(source)):
        raise InputError(f"{where}: source={source!r}: expected a release (NAME.TAG or hf-hub:…) or null.")


def data_of(staged: Staged, data_dir: str | None, measured: bool, recipe: str | None = None) -> Recipe | None:
    """The recipe whose test set is to be looked at: where the data are at hand, or were asked for."""
    found = load_recipe(recipe) if recipe is not None else staged.recipe()
    if found is None:
        if data_dir or measured:
            raise InputError(f"{staged.path} has no {RECIPE}: name the --recipe of the data, such as cifar100_lt.")
        return None
    if not (data_dir or measured or found.dataset in EMBEDDED):
        return None
    return dataclasses.replace(found, data_dir=data_dir)


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG")
    parser.add_argument("--data-dir", metavar="DIR", help="measure on the data in this folder")
    parser.add_argument("--measure", action="store_true", help="measure on the recipe's data, from the Hub if need be")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="of the data, for a converted checkpoint")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    set_threads(None)
    staged = Staged.find(args.name, args.root)
    data = data_of(staged, args.data_dir, args.measure, args.recipe)
    found = verify(staged, data)
    when = "measured" if data is not None else "measured before, of the same files"
    print(f"{staged.path}: {len(found['files'])} files, golden output within {found['golden']:g}")
    for stage, numbers in (found["measured"] or {}).items():
        print(f"{stage}: {numbers['all']:.2f} % {when}, {numbers['stated']:.2f} % stated")
    if found["measured"] is None:
        print("accuracy not measured: give --data-dir, or --measure to read the data from the Hub")
    print("verified")


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
