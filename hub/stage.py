"""Turn a run folder, or a checkpoint of the authors' code, into a release folder: hub/NAME.TAG/.

python hub/stage.py SOURCE NAME.TAG [--seeds RUN …] [--recipe NAME|FILE] [--data-dir DIR] [--no-measure]

SOURCE is the folder of a finished run, a staged release (to add --seeds), or an authors' .pth file. Where the data are
available, the model is measured on the test set: for the curve of the router, and for the results of a checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from card import shots_of, write_card
from examples import draw_examples, write_examples
from folder import (
    CLASSES,
    CURVES,
    GOLDEN,
    HERE,
    LICENCE,
    RECIPE,
    RESULTS,
    ROUTING,
    Staged,
    check_num_classes,
    is_registered,
    parse_name,
    read_json,
    read_recipe,
    record,
    repository,
    repository_facts,
    write_json,
)
from measure import measure

from ride_timm import InputError, RunError, load_legacy
from ride_timm.cli.process import exit_code
from ride_timm.data.datasets import EMBEDDED, KNOWN
from ride_timm.evaluation.macs import count_macs
from ride_timm.evaluation.plots import plot_long_tail, plot_routing
from ride_timm.evaluation.tables import GROUPS, STAGE_NAMES, ensemble_metrics
from ride_timm.files import write_atomically, write_text
from ride_timm.hardware import device_name, set_threads
from ride_timm.inference.load import folder_of
from ride_timm.models import Ride
from ride_timm.models.release import (
    CONFIG,
    DATA_CONFIG,
    WEIGHTS,
    release_table,
    sha256_of,
    without_implied_args,
)
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import RunFolder, provenance

_DAMAGED = "copy it again from where the run was made"
_CPU = torch.device("cpu")
_FACTS_OF_A_SEED = ("seed", "commit", "precision", "device", "num_processes", "seconds")


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A temporary folder inside `root`, so that its content can be renamed into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=root) as scratch:
        yield Path(scratch)


def stage(source: Path, name: str, root: Path = HERE, **options: Any) -> Staged:
    """Build a release and install it in `root`; options as of `build`."""
    with scratch_folder(root) as scratch:
        return install(build(source, name, scratch, **options), root)


def build(
    source: Path,
    name: str,
    root: Path,
    *,
    seeds: tuple[Path, ...] = (),
    recipe: Recipe | None = None,
    data_dir: str | None = None,
    measured: bool = True,
    facts: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> Staged:
    """Write the release folder root/NAME.TAG, which must not exist yet.

    seeds: further runs of the same recipe; recipe: the data of a checkpoint; data_dir: the folder of the data;
    measured: False skips the test set; facts: further entries of results.json; files: further text files by name.
    InputError for a source that is not a finished run or a checkpoint, or of another network.
    """
    network, tag = parse_name(name)
    new = root / name
    if not source.exists():
        raise InputError(f"{source}: no such run folder or checkpoint.")
    is_run = source.is_dir()
    if seeds and not is_run:
        raise InputError("--seeds takes runs of one recipe, and a checkpoint has no recipe.")
    if data_dir and not is_run and recipe is None:
        raise InputError("--data-dir needs --recipe for a checkpoint, such as cifar100_lt.")
    new.mkdir()
    if is_run:
        results, recipe = _copy_run(source, new, seeds)
    else:
        results = _convert_checkpoint(source, name, new)
    config = _finish_config(new / CONFIG, network, tag)
    model = timm.create_model(f"local-dir:{new}", pretrained=True).eval()
    if recipe is not None and data_dir:
        recipe = dataclasses.replace(recipe, data_dir=data_dir)
    measured = measured and recipe is not None and (not is_run or data_dir is not None or _test_set_is_here(recipe))
    if measured and recipe is not None:
        found = measure(model, recipe)
        names = found.pop("class_names")
        if is_run:
            _check_same(results["stages"], found["stages"])
            found = {key: value for key, value in found.items() if key == "routing"}
        else:
            config["label_names"] = names
            found |= dict(measured_with=recipe.augment, shots=list(recipe.shots), device=device_name(_CPU))
        results |= found
    elif is_run and "router" in results["stages"] and "routing" not in results:
        print("notice: no test set here, so the release has no curve of the router: pass --data-dir", file=sys.stderr)
    results.pop("examples", None)
    if measured and recipe is not None and recipe.dataset in EMBEDDED:  # their licence lets the images go along
        results["examples"] = write_examples(model, recipe, new)
    elif config.get("label_names") and results.get("class_counts"):
        results["examples"] = draw_examples(model, config["label_names"], results["class_counts"], new)
    results |= dict(network=_network_facts(model), data=_data_facts(recipe, results)) | (facts or {})
    write_json(new / CONFIG, config)
    write_json(new / RESULTS, results)
    if recipe is not None and is_run:
        write_text(new / RECIPE, _public(recipe).to_yaml())
    for file, text in (files or {}).items():
        write_text(new / file, text)
    if not (new / GOLDEN).is_file():
        pair = golden_pair(model)
        write_atomically(new / GOLDEN, lambda partial: safetensors.torch.save_file(pair, partial))
    if "per_class" in ensemble_metrics(results["stages"]):
        names = config.get("label_names") or list(map(str, range(model.num_classes)))
        rows = {STAGE_NAMES[stage]: metrics for stage, metrics in results["stages"].items()}
        plot_long_tail(new / CLASSES, rows, results["class_counts"], names, shots_of(results, recipe))
    if "routing" in results:
        plot_routing(new / ROUTING, **results["routing"], chosen=results["stages"]["router"])
    staged = Staged(name, new)
    write_card(staged)
    return staged


def install(new: Staged, root: Path) -> Staged:
    """Move a release from its scratch folder to `root`, in exchange for an older one of its name.

    A registered tag in hub/ is recorded in the package's table of releases.
    """
    final, old = Staged(new.name, root / new.name), new.path.with_name("old")
    if final.path.exists():
        os.replace(final.path, old)
    try:
        os.replace(new.path, final.path)
    except BaseException:
        if old.exists():
            os.replace(old, final.path)
        raise
    if root == HERE and is_registered(final.name):
        record(final)
    return final


@torch.inference_mode()
def golden_pair(model: Ride) -> dict[str, torch.Tensor]:
    """Images [B, C, H, W] of seeded noise and the model's outputs, in fp32 on the CPU."""
    channels, height, width = model.pretrained_cfg["input_size"]
    images = torch.randn(4 if height <= 64 else 2, channels, height, width, generator=torch.Generator().manual_seed(0))
    pair = dict(input=images, output=model(images))
    if model.router is not None:
        pair["routed_output"], pair["experts_used"] = model.forward_routed(images)
    return pair


def _read_run(path: Path, *files: str) -> tuple[dict[str, Any], Recipe]:
    """Results and recipe of a finished run, which may be staged; it must have these further files.

    InputError for an unfinished or damaged run, and for one of code that is in no commit or an unknown one.
    """
    for file in (*files, RESULTS, RECIPE):
        if not (path / file).is_file():
            raise InputError(f"{path} has no {file}: expected the folder of a finished run.")
    results, recipe = read_json(path / RESULTS, _DAMAGED), read_recipe(path / RECIPE, _DAMAGED)
    if results["commit"] is None:
        raise InputError(
            f"{path} was trained by code outside a git clone, so it cannot be reproduced: train again from a clone."
        )
    if results["commit"].endswith("+dirty"):
        raise InputError(
            f"{path} was trained with uncommitted changes (commit {results['commit']}), so it cannot be reproduced: "
            "commit them and train again."
        )
    return results, recipe


def _copy_run(source: Path, new: Path, seeds: tuple[Path, ...]) -> tuple[dict[str, Any], Recipe]:
    """Copy the files of a run; its results, with those of the other seeds, and its recipe."""
    results, recipe = _read_run(source, CONFIG, WEIGHTS)
    read_json(source / CONFIG, _DAMAGED)
    if (history := source / "metrics.csv").is_file():
        begun = {row["stage"] for row in csv.DictReader(history.read_text(encoding="utf-8").splitlines())}
        if unfinished := begun - results["stages"].keys():
            raise InputError(f"stage {unfinished.pop()} of the run in {source} is not finished: finish it by --resume.")
    if "source" in results:
        if seconds := _seconds_before(results):
            results["source_seconds"] = seconds
        results["source"] = _public_source(results["source"])
    if teacher := results.get("teacher"):
        teacher["spec"] = _public_source(teacher["spec"])
    was_staged, own = "seeds" in results, _seed_facts(results)
    runs = [own if run["seed"] == own["seed"] else run for run in results.get("seeds", [own])]
    for path in seeds:
        theirs, their_recipe = _read_run(path)
        their_recipe = _public(their_recipe) if was_staged else their_recipe
        if keys := [key for key in recipe.differing(their_recipe) if key != "seed"]:
            raise InputError(f"the recipe of {path} differs in more than the seed: {', '.join(keys)}.")
        if ("source" in results) != ("source" in theirs):
            raise InputError(f"only one of {source} and {path} started from trained weights (--from).")
        runs.append(_seed_facts(theirs))
    numbers = [run["seed"] for run in runs]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds: the runs have seeds {', '.join(map(str, numbers))}; expected different ones.")
    results["seeds"] = runs
    for file in (CONFIG, WEIGHTS, CURVES, GOLDEN, LICENCE):
        if (source / file).is_file():
            shutil.copyfile(source / file, new / file)
    return results, recipe


def _seed_facts(results: dict[str, Any]) -> dict[str, Any]:
    """The entry of one run among the seeds of a release."""
    stages = {name: {key: metrics[key] for key in GROUPS} for name, metrics in results["stages"].items()}
    return {key: results[key] for key in _FACTS_OF_A_SEED if key in results} | dict(stages=stages)


def _public_source(source: str | None) -> str | None:
    """The public name of the weights of a source or a teacher; None for private ones."""
    if source is None or source.startswith("hf-hub:"):
        return source
    folder = folder_of(source)
    if (folder / WEIGHTS).is_file():
        known = release_table().get(folder.name, {}).get("sha256")
        return folder.name if known == sha256_of(folder / WEIGHTS) else None
    if "." not in source and timm.is_model(source):
        source = f"{source}.{timm.get_pretrained_cfg(source).tag}"
    return source if is_registered(source) else None


def _seconds_before(results: dict[str, Any]) -> float | None:
    """Training time of the weights that a run started from, with theirs; None unless all of them are here."""
    if "source" not in results:
        return 0.0
    if "source_seconds" in results:
        return results["source_seconds"]
    source = results["source"]
    if source is None:
        return None
    folder = folder_of(source)
    folder = folder if folder.is_dir() else HERE / (_public_source(source) or "")
    if not (folder / RESULTS).is_file():
        return None
    own = read_json(folder / RESULTS, _DAMAGED)
    seconds, earlier = own.get("seconds"), _seconds_before(own)
    return None if seconds is None or earlier is None else seconds + earlier


def _convert_checkpoint(source: Path, name: str, new: Path) -> dict[str, Any]:
    """Convert an authors' checkpoint; the first entries of its results."""
    model = load_legacy(source)
    found, network = model.pretrained_cfg["architecture"], name.partition(".")[0]
    if found != network:
        raise InputError(f"{source} holds a {found}, not a {network}.")
    if is_registered(name):
        cfg = timm.get_pretrained_cfg(name).to_dict(remove_source=True)
        model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, **cfg)
    RunFolder(new).export(model, {key: model.pretrained_cfg[key] for key in DATA_CONFIG}, ())
    return dict(recipe=None, seed=None, **provenance(), precision="no", stages={})


def _finish_config(path: Path, network: str, tag: str) -> dict[str, Any]:
    """The config.json of a release, with its tag and the sha256 of the weights."""
    config, name = read_json(path), f"{network}.{tag}"
    if config["architecture"] != network:
        raise InputError(f"the source holds a {config['architecture']}, not a {network}.")
    check_num_classes(name, config["num_classes"])
    config["pretrained_cfg"]["tag"] = tag
    config = without_implied_args(config) | dict(sha256=sha256_of(path.with_name(WEIGHTS)))
    write_json(path, config)
    return config


def _public(recipe: Recipe) -> Recipe:
    """The recipe without local paths.

    A folder of images or a file of class weights becomes its name, a file of backbone weights the published ones.
    """
    dataset = recipe.dataset
    if "dataset" in recipe.on_disk or os.path.isdir(dataset):
        dataset = re.sub(r"[^\w.-]+", "_", Path(dataset).name).strip("._-") or "local_images"
    class_weights = recipe.class_weights and Path(recipe.class_weights).name  # the weights are in results.json
    paths = dict(data_dir=None, annotations=None, class_weights=class_weights, backbone_weights=None)
    return dataclasses.replace(recipe, dataset=dataset, backbone_pretrained=recipe.pretrained, **paths)


def _test_set_is_here(recipe: Recipe) -> bool:
    """The test set of a run is embedded, or still where the run has read it."""
    local = recipe.data_dir or (None if recipe.dataset in KNOWN else recipe.dataset)
    return recipe.dataset in EMBEDDED or (local is not None and Path(local).expanduser().exists())


def _check_same(stated: dict[str, Any], measured: dict[str, Any]) -> None:
    """RunError where a model does not reach the accuracy that its run stated (within 0.1 points)."""
    for name, metrics in stated.items():
        if name in measured and abs(measured[name]["all"] - metrics["all"]) > 0.1:
            raise RunError(
                f"{name}: measured {measured[name]['all']:.2f} %, the results of the run state {metrics['all']:.2f} %: "
                "the weights are of another run, or the data differ."
            )


def _network_facts(model: Ride) -> dict[str, Any]:
    macs = count_macs(model, tuple(model.pretrained_cfg["input_size"]))
    experts = [round(own) for own in macs.experts]
    return dict(params=macs.params, macs=round(macs.ensemble), trunk_macs=round(macs.trunk), expert_macs=experts)


def _data_facts(recipe: Recipe | None, results: dict[str, Any]) -> dict[str, Any]:
    if recipe is None:
        return {}
    counts = results.get("class_counts")
    recipe = _public(recipe)
    facts = dict(dataset=recipe.dataset, imb_type=recipe.profile)
    facts |= dict(imb_factor=recipe.imb_factor, split_seed=recipe.split_seed)
    return facts | (dict(train_images=sum(counts)) if counts else {})


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="finished run folder, staged release or .pth file")
    parser.add_argument("name", metavar="NAME.TAG", help="such as ride_resnet32.cifar100_lt100")
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], metavar="RUN", help="runs with other seeds")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="recipe with the data of a checkpoint")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: as the run read them)")
    parser.add_argument("--namespace", metavar="N", help="owner on the Hub, whom the card names")
    parser.add_argument("--no-measure", dest="measured", action="store_false", help="skip the test set")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    if args.recipe and args.source.is_dir():
        raise InputError("--recipe is for checkpoints: a run folder has its own.")
    set_threads(None)
    recipe = load_recipe(args.recipe) if args.recipe else None
    options = dict(seeds=tuple(args.seeds), recipe=recipe, data_dir=args.data_dir, measured=args.measured)
    if args.namespace:
        options |= dict(facts=repository_facts(args.name, repository(args.name, args.namespace)))
    staged = stage(args.source, args.name, args.root, **options)
    print(f"staged {staged.path}: {', '.join(staged.hashes())}")
    print(f"next: python hub/verify.py {args.name}, and python hub/tables.py for the tables")


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
