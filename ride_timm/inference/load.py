"""Load a model for a command, with the recipe and the threshold that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..data.augment.policies import Policy, policy_of
from ..data.datasets import KNOWN
from ..data.hub import is_hub_id
from ..errors import InputError
from ..models import Ride
from ..models.download import download_if_there
from ..models.load import HUB, load_model
from ..models.release import is_release
from ..training.recipe import Recipe, available, load_recipe

RECIPE = "recipe.yaml"
SPEC = "run folder, authors' .pth, or any name that timm.create_model takes"


def load_ride(spec: str, routed: bool) -> Ride:
    """The model of a SPEC, in eval mode; InputError for a missing router."""
    model = load_model(spec)
    if routed and model.router is None:
        raise InputError(f"{spec} has no router: leave --routed out, or train stage two.")
    return model


def check_channels(model: Ride, spec: str) -> None:
    """InputError for a model that takes other channels than image files have."""
    if model.in_chans not in (1, 3):
        raise InputError(f"{spec} takes {model.in_chans} channels: image files have 1 (grey) or 3 (RGB).")


def folder_of(spec: str) -> Path:
    """The folder that a SPEC names, if it names one."""
    return Path(spec.removeprefix("local-dir:"))


def run_file(spec: str, file: str) -> Path | None:
    """A file beside the weights of a run or release, in its folder or on the Hub; None where there is none."""
    if spec.startswith(HUB):
        return download_if_there(spec.removeprefix(HUB), file)
    path = folder_of(spec) / file
    return path if path.is_file() else None


def own_recipe(spec: str) -> Recipe | None:
    """The recipe of a run or release; None for any other SPEC."""
    path = run_file(spec, RECIPE)
    return load_recipe(path) if path else None


def data_recipe(name: str | None, spec: str | None, flags: dict[str, Any]) -> Recipe:
    """The recipe of the data: the one named, the model's own, or the data set's.

    flags: recipe keys given on the command line, which take precedence; those of another data set replace all that the
    recipe says of its images. InputError where no data set is given, or only a release whose images were local files.
    """
    path = None if name or spec is None else run_file(spec, RECIPE)
    if source := name or path:
        recipe = load_recipe(source)
    elif "dataset" in flags:
        known = KNOWN.get(flags["dataset"])
        if known and known.recipe:
            recipe = load_recipe(known.recipe)
        else:
            recipe = Recipe(augment=known.augment if known else "imagenet")
    else:
        raise InputError(f"no data set given: pass --dataset or --recipe (one of {', '.join(available())}).")
    if path and flags.get("dataset", recipe.dataset) != recipe.dataset:
        recipe = recipe.on_other_data()
    elif (
        path
        and (str(spec).startswith(HUB) or is_release(path.parent))
        and "data_dir" not in flags
        and set(recipe.on_disk) - {"backbone_weights"}
    ):
        raise InputError(f"{path} is of a release and names local files: pass --dataset, --data-dir or --recipe.")
    elif path and not {"dataset", "data_dir"} & flags.keys():
        _check_still_there(recipe, path.parent)
    return recipe.override(flags)


def _check_still_there(recipe: Recipe, run: Path) -> None:
    """InputError for a run on a folder that is not here, such as a relative path; a Hub id is left to the Hub."""
    dataset = recipe.dataset
    if recipe.data_dir or dataset in KNOWN or is_hub_id(dataset) or Path(dataset).expanduser().exists():
        return
    raise InputError(f"the run {run} was trained on the images in {dataset!r}, which is not here: pass --dataset.")


def input_policy(model: Ride, recipe: Recipe, spec: str, stated: bool) -> Policy:
    """How the images of a test set become a model's inputs.

    That is as the model states, as for single images, unless the command states it: by a recipe, by --augment, or for
    an authors' checkpoint, which states nothing, by a known data set.
    """
    stated = stated or own_recipe(spec) is not None or (Path(spec).is_file() and recipe.dataset in KNOWN)
    return recipe.policy if stated else policy_of(PretrainedCfg(**model.pretrained_cfg), spec)


def threshold_for(spec: str, given: float | None) -> float:
    """The threshold given, else the model's, else 0.5; InputError outside [0, 1]."""
    if given is not None and not 0 <= given <= 1:
        raise InputError(f"threshold={given}: expected a probability between 0 and 1.")
    if given is not None:
        return given
    own = own_recipe(spec)
    return own.threshold if own else 0.5
