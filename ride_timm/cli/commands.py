"""The commands that run a trained model: evaluate, predict, export."""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import KNOWN
from ..errors import InputError
from ..files import write_atomically
from ..inference.options import Timed, inference_of, prepare
from ..models import Ride
from ..models.load import check_images, check_path, load_model
from ..models.release import is_release
from ..training.arguments import flags_given
from ..training.recipe import Recipe, available, load_recipe

_DATA_KEYS = ("dataset", "annotations", "imb_type", "imb_factor", "split_seed", "image_column", "label_column")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _own_recipe(spec: str | None) -> Recipe | None:
    """The recipe of a run folder, as it was run; None for other models."""
    path = Path(spec.removeprefix("local-dir:")) / "recipe.yaml" if spec else None
    if path is None or not path.is_file():
        return None
    recipe = load_recipe(path)
    if recipe.on_disk and is_release(path.parent):
        raise InputError(f"{path} is of a release and names data on a disk: give --data-dir, or --recipe.")
    return recipe


def recipe_for(args: argparse.Namespace) -> Recipe:
    """The recipe to take the data from: named, the run's own, or the one that fits the data set."""
    flags = flags_given(args)
    flags.pop("model", None)
    if args.recipe:
        recipe = load_recipe(args.recipe)
    elif (own := _own_recipe(getattr(args, "model", None))) is not None:
        recipe = own
    elif "dataset" in flags:
        known = KNOWN.get(flags["dataset"])
        recipe = (
            load_recipe(known.recipe)
            if known and known.recipe
            else Recipe(augment=known.augment if known else "imagenet")
        )
    else:
        raise InputError(f"what to read? Name --dataset or --recipe (there are {', '.join(available())}).")
    return recipe.override(flags)


def load_data(recipe: Recipe, use_val: bool = False) -> Any:
    """The recipe's data set; its validation split only where that is wanted, not because a run chose an epoch on it."""
    from ..data.load import load_longtail

    return load_longtail(**recipe.data_args | dict(use_val=use_val))


def _load(args: argparse.Namespace, needs_router: bool) -> Ride:
    model = load_model(args.model)
    if needs_router and model.router is None:
        raise InputError(f"{args.model} has no router: leave --routed out, or train stage two.")
    return model


def _threshold(args: argparse.Namespace) -> float:
    """The gate probability that was asked for, else the run's own, else 0.5."""
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise InputError(f"threshold={args.threshold}: expected a probability, 0 to 1.")
    own = _own_recipe(args.model)
    return args.threshold if args.threshold is not None else own.threshold if own else 0.5


def _check_threshold(given: bool, routed: bool) -> None:
    """InputError for a threshold that nothing would ask for."""
    if given and not routed:
        raise InputError("threshold steers the router: give --routed as well, or leave --threshold out.")


# evaluate


def _check_evaluate(args: argparse.Namespace) -> None:
    """InputError for flags that do not go together or a curve that could not be written, before anything is read."""
    if args.macs_budget is not None:
        if not (math.isfinite(args.macs_budget) and args.macs_budget > 0):
            raise InputError(f"macs-budget={args.macs_budget}: expected MACs per image, such as 80e6.")
        if not args.routed:
            raise InputError("macs-budget chooses a routing threshold: give --routed as well.")
        if "threshold" in flags_given(args):
            raise InputError("macs-budget chooses the threshold itself: leave --threshold out.")
    _check_threshold("threshold" in flags_given(args), args.routed)
    _check_experts(args, args.routed or args.curve is not None)
    if args.plots is not None:
        if not Path(args.plots).is_dir():
            raise InputError(f"plots={args.plots}: there is no such folder.")
        if find_spec("matplotlib") is None:
            raise InputError("plots needs matplotlib: pip install matplotlib.")
    if args.curve is not None:
        path = Path(args.curve)
        if path.suffix not in (".png", ".csv"):
            raise InputError(f"curve={args.curve}: name a .png or a .csv file.")
        if not path.parent.is_dir():
            raise InputError(f"curve={args.curve}: there is no folder {path.parent}.")
        if path.suffix == ".png":
            try:
                import matplotlib  # noqa: F401
            except ImportError:
                raise InputError(f"curve={args.curve}: a picture needs matplotlib (pip install matplotlib); "
                                 "a .csv does not.") from None  # fmt: skip


def _check_experts(args: argparse.Namespace, routed: bool) -> None:
    """InputError for chosen experts where none can be chosen, before any tool or model is looked for."""
    if args.experts is not None and (routed or args.runtime == "onnx"):
        raise InputError(
            f"experts={args.experts}: the router chooses where --routed or --curve is given or the model was saved as "
            "routed, and ONNX's graph averages all: leave one of both out."
        )


def _experts(args: argparse.Namespace, model: Ride) -> list[int]:
    """The experts to average, from 0: those of `--experts 0,2`, or all."""
    if args.experts is None:
        return list(range(model.num_experts))
    try:
        chosen = [int(part) for part in args.experts.split(",")]
    except ValueError:
        raise InputError(f"experts={args.experts!r}: expected numbers from 0, such as 0,2.") from None
    if len(set(chosen)) < len(chosen) or not all(0 <= i < model.num_experts for i in chosen):
        raise InputError(f"experts={args.experts}: expected different numbers from 0 to {model.num_experts - 1}.")
    return chosen


def evaluate_command(args: argparse.Namespace) -> None:
    from ..data.augment.policies import get_policy
    from ..data.loaders import make_loader
    from ..evaluation.evaluate import evaluate, evaluation_batch
    from ..evaluation.macs import count_macs
    from ..evaluation.routing_curve import check_budget, collect_outcomes, prefix_points, routing_curve, thin
    from ..evaluation.tables import groups_table, metrics_table, millions

    _check_evaluate(args)
    check_path(args.model)
    inference = inference_of(args)
    recipe = recipe_for(args)
    model = _load(args, args.routed or args.curve is not None).to(memory_format=torch.channels_last)  # as in training
    experts = _experts(args, model)
    data = load_data(recipe, use_val=recipe.use_val and args.macs_budget is not None)
    if data.num_classes != model.num_classes:
        raise InputError(f"{args.model} has {model.num_classes} classes, the data set {data.name} {data.num_classes}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = get_policy(recipe.augment).input_size(recipe.input_size)
    check_images(model, (3, size, size), args.model)
    macs = count_macs(model, (3, size, size))
    if args.macs_budget is not None:
        check_budget(macs, args.macs_budget)
    model = model.to(device)

    def batches(image_set: Any) -> Any:
        where = dict(input_size=size, device=device, num_workers=recipe.workers)
        where |= dict(reduced_decode=recipe.reduced_decode)
        return make_loader(image_set, recipe.augment, train=False, batch_size=evaluation_batch(size), seed=0, **where)

    threshold, chosen = recipe.threshold, None
    if args.macs_budget is not None:
        chosen = _choose_threshold(model, macs, data, recipe, _own_recipe(args.model), batches, args.macs_budget)
        threshold = chosen["threshold"]
    test = batches(data.test)
    by_expert = None if args.routed or inference.runtime == "onnx" else experts
    answer = Timed(prepare(model, inference, args.routed, threshold, size, by_expert))
    members = None if by_expert is None else len(by_expert)
    metrics = evaluate(
        model, test, data.class_counts, args.routed, threshold, answer, members=members, shots=recipe.shots
    )
    used = metrics.get("experts_used")
    cost = macs.expected(used) if used else macs.trunk + sum(macs.experts[i] for i in experts)
    metrics |= dict(macs=round(cost), images=len(data.test))
    metrics["correct"] = round(metrics["all"] * len(data.test) / 100)
    name = "routed" if args.routed else "ensemble"
    if args.experts is not None:
        metrics["members"], name = experts, f"experts {args.experts}"
    rows = {name: metrics}
    if args.plots is not None:
        from ..evaluation.plots import plot_measures

        plot_measures(Path(args.plots), rows)
    if args.routed:
        metrics["threshold"] = threshold
    if chosen:
        metrics |= dict(macs_budget=args.macs_budget, chosen_on=chosen)
    if args.time:
        metrics |= dict(images_per_second=round(answer.images_per_second, 1), inference=str(inference))
    if args.curve is not None:
        outcomes = collect_outcomes(model, test)
        prefixes = prefix_points(outcomes, macs, data.class_counts, recipe.shots)
        curve = thin(routing_curve(outcomes, macs, data.class_counts, shots=recipe.shots))
        _write_curve(Path(args.curve), curve, prefixes)
        metrics |= dict(curve=curve, prefixes=prefixes)
        rows |= {f"{i + 1} expert{'s' * (i > 0)} always": point for i, point in enumerate(prefixes)}
    if args.json:
        return print_json(metrics)
    print(metrics_table(rows))
    print(f"{metrics['correct']} of {metrics['images']} test images right")
    print(f"\n{groups_table(metrics)}")
    if chosen:
        over = ": above the budget" if metrics["macs"] > args.macs_budget else ""
        print(f"threshold {threshold:.4g}, for at most {millions(args.macs_budget)} MMACs an image; chosen on "
              f"{chosen['images']} {chosen['source']}, class-balanced: {chosen['all']:.2f} % at "
              f"{millions(chosen['macs'])} MMACs there, {millions(metrics['macs'])} on the test set{over}")  # fmt: skip
    if args.time:
        print(
            f"{metrics['images_per_second']:,.1f} images/s ({inference}; {device}, {torch.get_num_threads()} threads)"
        )
    if args.curve is not None:
        print(f"{len(curve)} points of the routing curve in {args.curve}")


def _choose_threshold(
    model: Ride, macs: Any, data: Any, recipe: Recipe, own: Recipe | None, batches: Any, macs_budget: float
) -> dict[str, Any]:
    """The best point within the budget on a stratified part of the training set, every class weighing alike.

    That is the data set's validation split where it is used, else the very part the run held out; where none is known,
    a fifth of what the model has seen in training: on such images it is surer than on new ones, so that on those more
    may go on than was expected.
    """
    from ..data.load import hold_out
    from ..evaluation.routing_curve import collect_outcomes, point_for_budget, routing_curve

    unseen = own is not None and own.holdout > 0 and all(getattr(own, k) == getattr(recipe, k) for k in _DATA_KEYS)
    if data.val is not None:
        held_out, unseen, source = data.val, True, "validation images"
    else:
        held_out = hold_out(data.train, own.holdout if unseen else 0.2, recipe.split_seed)[1]
        source = "training images" + (" that the run held out" if unseen else ", which the model has SEEN in training")
    outcomes = collect_outcomes(model, batches(held_out))
    curve = routing_curve(outcomes, macs, data.class_counts, outcomes.balanced_weights(), recipe.shots)
    point = point_for_budget(curve, macs_budget)
    return point | dict(images=len(held_out), seen_in_training=not unseen, source=source)


def _write_curve(path: Path, curve: list[dict[str, Any]], prefixes: list[dict[str, Any]]) -> None:
    from ..evaluation.plots import plot_curve
    from ..evaluation.routing_curve import curve_table

    if path.suffix == ".png":
        write_atomically(path, lambda partial: plot_curve(partial, curve, prefixes))
    else:
        write_atomically(path, lambda partial: partial.write_text(curve_table(curve, prefixes), encoding="utf-8"))


# predict


@torch.inference_mode()
def predict_command(args: argparse.Namespace) -> None:
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    from ..data.augment.images import upright

    _check_experts(args, args.routed)
    inference = inference_of(args)
    images = []
    for path in args.images:
        try:
            images.append(upright(Image.open(path)))
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"image {path} cannot be read: {error}") from error
    model = _load(args, args.routed)
    if model.in_chans not in (1, 3):
        raise InputError(f"{args.model} takes {model.in_chans} channels, expected 1 (grey) or 3 (RGB) for image files.")
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    routed = args.routed or model.routed
    _check_experts(args, routed)
    _check_threshold(args.threshold is not None, routed)
    experts = _experts(args, model) if args.experts is not None else None
    answer = prepare(model, inference, routed, _threshold(args), config["input_size"][-1], experts)
    predictions = []
    for path, image in zip(args.images, images, strict=True):
        logits, used = answer(transform(image if model.in_chans == 3 else image.convert("L"))[None])
        logits = logits if experts is None else logits.mean(1)
        top = logits.softmax(1)[0].topk(min(5, model.num_classes))
        choices = [
            dict(label=names[i], index=i, probability=round(p, 6))
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        routing = dict(experts_used=int(used)) if used is not None else {}
        predictions.append(dict(image=str(path), **choices[0], **routing, top=choices))
    if args.json:
        return print_json(predictions)
    for found in predictions:
        experts = f"  ({found['experts_used']} of {model.num_experts} experts)" if routed else ""
        print(f"{found['image']}: {found['label']} {100 * found['probability']:.1f} %{experts}")


# export


def export_command(args: argparse.Namespace) -> None:
    from ..inference.export import check_export, export

    check_export(args.output)
    _check_threshold(args.threshold is not None, args.routed != "none")
    if args.input_size is not None and args.input_size < 8:
        raise InputError(f"input-size={args.input_size}: expected 8 or more pixels.")
    model = _load(args, args.routed != "none")
    threshold = _threshold(args)
    side = args.input_size or model.pretrained_cfg["input_size"][-1]
    check_images(model, (model.in_chans, side, side), args.model)
    folder = export(model, args.output, args.routed, threshold, args.input_size)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if args.json:
        return print_json(dict(folder=str(folder), files=files))
    for name, size in files.items():
        print(f"{folder / name}  {size:,} bytes")
