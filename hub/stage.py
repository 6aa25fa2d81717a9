"""Turn a run folder, or a checkpoint of the authors' code, into a Hub repository folder: hub/NAME.TAG/.

python hub/stage.py SOURCE NAME.TAG [--seeds RUN …] [--recipe NAME|FILE] [--data-dir DIR] [--no-measure]

SOURCE is a finished run folder of train_accelerate.py, a release staged from one, to which --seeds adds further runs,
or an authors' .pth file. The model is measured on the test set where the data are at hand, which gives the router's
curve and, for a checkpoint, its results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from card import hand_edited, shots_of, write_card
from measure import measure
from pictures import draw_classes, draw_routing
from staged import (
    GOLDEN,
    HERE,
    RECIPE,
    RESULTS,
    Staged,
    is_registered,
    parse_name,
    read_json,
    read_recipe,
    read_table,
    write_table,
)

from ride_timm import InputError, RunError, load_legacy
from ride_timm.cli.process import exit_code
from ride_timm.data.datasets import EMBEDDED
from ride_timm.evaluation.macs import count_macs
from ride_timm.hardware import device_name, set_threads
from ride_timm.models import Ride
from ride_timm.models.release import CONFIG, WEIGHTS, release_table, sha256_of, without_implied_args
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import RunFolder, provenance

_DAMAGED = "take it anew from where the run was made"
_SHOWN = ("all", "many", "medium", "few")
_OF_A_SEED = ("seed", "commit", "precision", "device", "num_processes", "seconds")
_OF_THE_DATA = ("num_classes", "in_chans", "global_pool", "img_size", "backbone_pretrained")
_DEFAULTS = dict(num_experts=3, use_norm=True, reduce_dimension=True, share_expert_help_pred_fc=True, router=False)


@torch.inference_mode()
def golden_pair(model: Ride) -> dict[str, torch.Tensor]:
    """Images [B, C, H, W] of seeded noise and the model's answers to them, in fp32 on the CPU."""
    channels, height, width = model.pretrained_cfg["input_size"]
    images = torch.randn(4 if height <= 64 else 2, channels, height, width, generator=torch.Generator().manual_seed(0))
    pair = dict(input=images, output=model(images))
    if model.router is not None:
        pair["routed_output"], pair["experts_used"] = model.forward_routed(images)
    return pair


def stage(
    source: Path,
    name: str,
    root: Path = HERE,
    *,
    seeds: tuple[Path, ...] = (),
    recipe: Recipe | None = None,
    data_dir: str | None = None,
    measured: bool = True,
    facts: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> Staged:
    """Stage a release; what stood in its folder gives way at the end, but for a hand-edited section of its card.

    seeds: runs of the same recipe with other seeds, for the spread, beside those that a staged release has already;
    recipe: of a checkpoint's data; data_dir: where the data lie; measured: look at the test set, if it is at hand;
    facts: further entries of results.json; files: further texts, by name.
    InputError for a source that is none, or of another network, or whose data are asked for and not there.
    """
    network, tag = parse_name(name)
    by_hand = hand_edited(Staged(name, root / name).card())
    root.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    try:
        if source.is_dir():
            results, recipe, names = _from_run(source, new, seeds)
        elif source.is_file():
            if seeds:
                raise InputError("--seeds are run folders of one recipe: a checkpoint has none.")
            results, names = _from_checkpoint(source, name, new), None
        else:
            raise InputError(f"{source}: no such run folder or checkpoint.")
        _finish_config(new, network, name, tag)
        model = timm.create_model(f"local-dir:{new}", pretrained=True).eval()
        recipe = _with_data(recipe, data_dir)
        if measured and recipe is not None and (data_dir or recipe.dataset in EMBEDDED or not source.is_dir()):
            found = measure(model, recipe)
            names = found.pop("class_names")
            if source.is_dir():
                _check_same(results["stages"], found["stages"])
                found = {key: value for key, value in found.items() if key == "routing"}
            else:
                facts = dict(facts or {}, measured_with=recipe.augment, device=device_name(torch.device("cpu")))
                facts["shots"] = list(recipe.shots)  # its recipe, which says so for a run, does not go along
                _name_classes(new / CONFIG, names)
            results |= found
        results |= dict(network=_network_facts(model), data=_data_facts(recipe, results)) | (facts or {})
        if recipe is not None and source.is_dir():
            (new / RECIPE).write_text(_public(recipe).to_yaml(), encoding="utf-8")
        for file, text in (files or {}).items():
            (new / file).write_text(text, encoding="utf-8")
        if not (new / GOLDEN).is_file():
            safetensors.torch.save_file(golden_pair(model), new / GOLDEN)
        (new / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if "per_class" in results["stages"].get("experts", {}):
            names = names or list(map(str, range(model.num_classes)))
            draw_classes(new / "classes.png", results, names, shots_of(results, recipe))
        if "routing" in results:
            draw_routing(new / "routing.png", results["routing"], results["stages"]["router"])
        _finish_folder(new, root / name, by_hand)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if root == HERE and is_registered(name):
        _write_down(name, root / name)
    return Staged(name, root / name)


def _from_run(source: Path, new: Path, seeds: tuple[Path, ...]) -> tuple[dict[str, Any], Recipe, list[str] | None]:
    """Copy what a run leaves; (its results, its recipe, its class names)."""
    for file in (CONFIG, WEIGHTS, RESULTS, RECIPE):
        if not (source / file).is_file():
            raise InputError(f"{source} holds no {file}: not a run folder, or its run is not finished.")
    folder = RunFolder(source)
    names = read_json(source / CONFIG, _DAMAGED).get("label_names")
    results, recipe = read_json(source / RESULTS, _DAMAGED), read_recipe(source / RECIPE, _DAMAGED)
    if len(results["stages"]) == 1 and recipe.num_experts > 1 and (source / "state.pt").is_file():
        state = folder.state()
        if state and state.stage == "router" and state.epoch:
            raise InputError(f"the run in {source} is not finished: its router is half trained (--resume).")
    if results.get("source") is not None:  # None: a release that began from somebody's own weights
        results["source"] = _public_name(results["source"])
    staged = "seeds" in results
    own = _of_a_seed(results)
    runs = [own if run["seed"] == own["seed"] else run for run in results["seeds"]] if staged else [own]
    for path in seeds:
        for file in (RESULTS, RECIPE):
            if not (path / file).is_file():
                raise InputError(f"{path} holds no {file}: not a finished run.")
        other, theirs = read_json(path / RESULTS, _DAMAGED), read_recipe(path / RECIPE, _DAMAGED)
        theirs = _public(theirs) if staged else theirs  # a release names no place on a disk
        if keys := [key for key in recipe.differing(theirs) if key != "seed"]:
            raise InputError(f"the run in {path} is of another recipe ({', '.join(keys)}), not of another seed alone.")
        if ("source" in results) != ("source" in other):
            raise InputError(f"{source} and {path}: one began from trained weights (--from), the other did not.")
        runs.append(_of_a_seed(other))
    numbers = [run["seed"] for run in runs]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds: runs of the seeds {numbers}, expected every seed once.")
    results["seeds"] = runs
    for file in (CONFIG, WEIGHTS, "curves.png", GOLDEN, "LICENSE"):  # a staged release keeps what it answered at first
        if (source / file).is_file():
            shutil.copyfile(source / file, new / file)
    return results, recipe, names


def _of_a_seed(results: dict[str, Any]) -> dict[str, Any]:
    """What a release says of each of its seeds."""
    stages = {name: {key: figures[key] for key in _SHOWN} for name, figures in results["stages"].items()}
    return {key: results[key] for key in _OF_A_SEED if key in results} | dict(stages=stages)


def _public_name(source: str) -> str | None:
    """What everybody knows the weights by that a run started from; None for somebody's own run or file."""
    if source.startswith("hf-hub:"):
        return source
    folder = Path(source.removeprefix("local-dir:"))
    if (folder / WEIGHTS).is_file():
        known = release_table().get(folder.name, {}).get("sha256")
        return folder.name if known == sha256_of(folder / WEIGHTS) else None
    if "." not in source and timm.is_model(source):  # the default tag is meant
        source = f"{source}.{timm.get_pretrained_cfg(source).tag}"
    return source if is_registered(source) else None


def _from_checkpoint(source: Path, name: str, new: Path) -> dict[str, Any]:
    """Convert an authors' checkpoint; gives the beginnings of its results."""
    network, _, _ = name.partition(".")
    model = load_legacy(source)
    found = model.pretrained_cfg["architecture"]
    if found != network:
        raise InputError(f"{source} holds a {found}, not a {network}.")
    if is_registered(name):
        cfg = timm.get_pretrained_cfg(name)
        if cfg.num_classes != model.num_classes:
            raise InputError(f"{source} has {model.num_classes} classes, the tag {name} {cfg.num_classes}.")
        model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, **cfg.to_dict(remove_source=True))
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    RunFolder(new).export(model, {key: model.pretrained_cfg[key] for key in keys}, ())
    return dict(recipe=None, seed=None, **provenance(), precision="no", stages={})


def _finish_config(new: Path, network: str, name: str, tag: str) -> None:
    """The released config.json: the tag, and the sha256 of the weights."""
    config = json.loads((new / CONFIG).read_text(encoding="utf-8"))
    if config["architecture"] != network:
        raise InputError(f"the source holds a {config['architecture']}, not a {network}.")
    if is_registered(name) and (expected := timm.get_pretrained_cfg(name).num_classes) != config["num_classes"]:
        raise InputError(f"the source has {config['num_classes']} classes, the tag {name} {expected}.")
    config["pretrained_cfg"]["tag"] = tag
    config = without_implied_args(config) | dict(sha256=sha256_of(new / WEIGHTS))
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name_classes(path: Path, names: list[str]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(config, label_names=names), indent=2) + "\n", encoding="utf-8")


def _with_data(recipe: Recipe | None, data_dir: str | None) -> Recipe | None:
    if data_dir is None:
        return recipe
    if recipe is None:
        raise InputError("--data-dir: name the --recipe of the data as well, such as cifar100_lt.")
    return dataclasses.replace(recipe, data_dir=data_dir)


def _public(recipe: Recipe) -> Recipe:
    """The recipe without places on this machine: of a folder of images, the name as a data set may be called."""
    dataset = recipe.dataset
    if "dataset" in recipe.on_disk or os.path.isdir(dataset):
        dataset = re.sub(r"[^\w.-]+", "_", Path(dataset).name).strip("._-") or "local_images"
    return dataclasses.replace(recipe, data_dir=None, annotations=None, dataset=dataset)


def _check_same(stated: dict[str, Any], measured: dict[str, Any]) -> None:
    """RunError where a run's model does not have the accuracy that its results state (in percentage points)."""
    for name, metrics in stated.items():
        if name in measured and abs(measured[name]["all"] - metrics["all"]) > 0.1:
            raise RunError(
                f"the model measures {measured[name]['all']:.2f} % ({name}), its results say {metrics['all']:.2f}: "
                "weights and results are not of one run, or the data are not the same."
            )


def _network_facts(model: Ride) -> dict[str, Any]:
    macs = count_macs(model, tuple(model.pretrained_cfg["input_size"]))
    experts = [round(own) for own in macs.experts]
    return dict(params=macs.params, macs=round(macs.ensemble), trunk_macs=round(macs.trunk), expert_macs=experts)


def _data_facts(recipe: Recipe | None, results: dict[str, Any]) -> dict[str, Any]:
    if recipe is None:
        return {}
    recipe, counts = _public(recipe), results.get("class_counts")
    facts = dict(dataset=recipe.dataset, imb_type=recipe.profile)
    facts |= {key: getattr(recipe, key) for key in ("imb_factor", "split_seed")}
    return facts | (dict(train_images=sum(counts)) if counts else {})


def _finish_folder(new: Path, final: Path, by_hand: str) -> None:
    """Render the card, with the old one's hand-edited section, and put the folder in place of the old one."""
    write_card(Staged(final.name, new), by_hand)
    for path in new.iterdir():
        path.chmod(0o644)
    new.chmod(0o755)
    if final.exists():
        away = final.with_name(f".{final.name}.old")
        shutil.rmtree(away, ignore_errors=True)
        os.replace(final, away)
        try:
            os.replace(new, final)
        except BaseException:
            os.replace(away, final)
            raise
        shutil.rmtree(away, ignore_errors=True)
    else:
        os.replace(new, final)


def _write_down(name: str, path: Path) -> None:
    """The sha256 and the arguments beside the tag's cfg."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    args = {
        key: value
        for key, value in config["model_args"].items()
        if key not in _OF_THE_DATA and _DEFAULTS.get(key) != value
    }
    table = read_table()
    same = table.get(name, {}).get("sha256") == config["sha256"]
    published = dict(published=table[name]["published"]) if same and "published" in table[name] else {}
    table[name] = dict(model_args=args, sha256=config["sha256"]) | published
    write_table(table)
    release_table.cache_clear()


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a finished run folder, a staged release, an authors' .pth"
    )
    parser.add_argument("name", metavar="NAME.TAG", help="such as ride_resnet32.cifar100_lt100")
    parser.add_argument(
        "--seeds", type=Path, nargs="+", default=[], metavar="RUN", help="runs of the recipe's other seeds"
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="of a checkpoint: the recipe with its data")
    parser.add_argument("--data-dir", metavar="DIR", help="read the data from this folder instead of the Hub")
    parser.add_argument("--no-measure", dest="measured", action="store_false", help="do not look at the test set")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    if args.recipe and args.source.is_dir():
        raise InputError("--recipe is for checkpoints: a run folder brings its own.")
    set_threads(None)
    recipe = load_recipe(args.recipe) if args.recipe else None
    where = dict(seeds=tuple(args.seeds), recipe=recipe, data_dir=args.data_dir, measured=args.measured)
    staged = stage(args.source, args.name, args.root, **where)
    print(f"staged {staged.path}: {', '.join(staged.hashes())}")
    print(f"next: python hub/verify.py {args.name}, then hub/tags.py and hub/results.py for the tables")


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
