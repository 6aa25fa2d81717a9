"""Measure accuracy on a test set, by shot group."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.class_order import class_order
from ..data.load import hold_out, load_longtail
from ..data.loaders import make_loader
from ..data.readable import leave_out
from ..errors import InputError
from ..evaluation.confusion_plots import write_confusions
from ..evaluation.counts import CountAccumulator
from ..evaluation.evaluate import collect, evaluation_batch, metrics_of
from ..evaluation.macs import Macs, count_macs
from ..evaluation.plots import plot_metrics, plot_routing
from ..evaluation.routing_curve import (
    Outcomes,
    check_budget,
    collect_outcomes,
    curve_table,
    point_for_budget,
    prefix_points,
    routing_curve,
    thin,
)
from ..evaluation.shifted import RATIOS, shifted_accuracies, shifted_table
from ..evaluation.tables import GROUPS, classes_table, confusions_table, groups_table, metrics_table, millions
from ..evaluation.test_prior import estimate_log_prior, log_prior_of
from ..files import write_text
from ..hardware import choose_device
from ..inference.load import SPEC, data_recipe, input_policy, load_ride, own_recipe, threshold_for
from ..inference.model_prior import add_prior_flags, check_prior_flags, model_log_prior, run_results
from ..inference.options import (
    Timed,
    add_inference_flags,
    averaged_crops,
    check_experts,
    check_threshold,
    chosen_experts,
    inference_of,
    prepare,
)
from ..models import Ride
from ..models.load import check_images, check_path
from ..models.release import class_names
from ..training.arguments import add_flags, flags_given, keys_of
from ..training.recipe import Recipe
from .process import print_json

# a run's held-out images are unseen only where the data are the run's own
_DATA_KEYS = ("dataset", "data_dir", "dataset_config", "dataset_revision", "annotations", "imb_type", "imb_factor",
              "split_seed", "image_column", "label_column")  # fmt: skip


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="SPEC", help=SPEC)
    parser.add_argument("--recipe", metavar="NAME|FILE", help="take the data from this recipe")
    parser.add_argument(
        "--macs-budget", type=float, metavar="MACS",
        help="with --routed: choose the threshold for at most this many MACs per image, on the run's held-out training "
        "images, or on training images that the model has seen if there are none",
    )  # fmt: skip
    parser.add_argument("--plots", metavar="DIR", help="draw long_tail.png, reliability.png and experts.png there")
    parser.add_argument(
        "--confusions",
        metavar="DIR",
        help="write confusion_matrix.csv and classes.csv there, and with matplotlib confusion_matrix.png",
    )
    parser.add_argument("--curve", metavar="FILE", help="write accuracy against MACs of best thresholds, .png or .csv")
    parser.add_argument("--time", action="store_true", help="report images per second of the forward passes")
    parser.add_argument(
        "--shifted",
        action="store_true",
        help="also report the forward and backward shifted test sets of SADE and BalPoE",
    )
    parser.add_argument(
        "--five-crop",
        action="store_true",
        help="average the logits of the four corners and the centre of each image",
    )
    add_prior_flags(parser)
    add_inference_flags(parser)
    add_flags(parser, [name for name in keys_of("data") if name != "holdout"] + ["threshold", "workers"])


def run(args: argparse.Namespace) -> None:
    _check(args)
    check_path(args.model)
    inference = inference_of(args)
    flags = _data_flags(args)
    recipe = data_recipe(args.recipe, args.model, flags)
    model = load_ride(args.model, args.routed or args.curve is not None).to(memory_format=torch.channels_last)
    experts = chosen_experts(args.experts, model.num_experts)
    data = load_longtail(**recipe.data_args | dict(use_val=recipe.use_val and args.macs_budget is not None))
    own = own_recipe(args.model)
    on_own_data = own is not None and all(getattr(own, key) == getattr(recipe, key) for key in _DATA_KEYS)
    if on_own_data:
        data = leave_out(data, run_results(args.model).get("unreadable", []))
    if data.notice:
        print(data.notice, file=sys.stderr)
    if data.num_classes != model.num_classes:
        raise InputError(f"{args.model} has {model.num_classes} classes, the data set {data.name} {data.num_classes}.")
    data = data.in_order(class_order(class_names(model), data.class_names, args.model))
    policy = input_policy(model, recipe, args.model, args.recipe is not None or "augment" in flags)
    size = policy.input_size(recipe.input_size)
    crops = 5 if args.five_crop else 1
    check_images(model, (3, size, size), args.model)
    macs = count_macs(model, (3, size, size))
    if args.macs_budget is not None:
        check_budget(macs, args.macs_budget)
    device = choose_device()
    model = model.to(device)

    def batches(image_set: Any) -> Any:
        where = dict(input_size=size, device=device, num_workers=recipe.workers)
        where |= dict(reduced_decode=recipe.reduced_decode, five_crops=args.five_crop)
        batch_size = evaluation_batch(size) // crops
        return make_loader(image_set, policy, train=False, batch_size=batch_size, seed=0, **where)

    threshold, chosen = threshold_for(args.model, recipe.threshold if "threshold" in flags else None), None
    if args.macs_budget is not None:
        holdout = own.holdout if own is not None and on_own_data else 0.0
        chosen = _choose_threshold(model, macs, data, recipe, holdout, batches, args.macs_budget)
        threshold = chosen["threshold"]
    test = batches(data.test)
    one_by_one = not args.routed and inference.runtime != "onnx"
    prepared = prepare(model, inference, args.routed, threshold, size, experts if one_by_one else None)
    predict = Timed(averaged_crops(prepared) if args.five_crop else prepared)
    num_members = len(experts) if one_by_one else None
    sizes = (model.num_classes, model.num_experts if args.routed else None, num_members)
    bare = None
    if args.test_prior is None and not args.shifted:
        counts = CountAccumulator(*sizes, device)
        predictions = ((*predict(images), targets) for images, targets in test)
        metrics = metrics_of(predictions, counts, data.class_counts, recipe.shots)
    else:
        counts = CountAccumulator(*sizes)
        metrics, bare = _evaluate_priors(args, collect(predict, test), counts, data, recipe.shots)

    used = metrics.get("experts_used")
    cost = macs.expected(used) if used else macs.trunk + sum(macs.experts[i] for i in experts)
    metrics |= dict(macs=round(crops * cost), images=len(data.test))
    metrics["correct"] = round(metrics["all"] * len(data.test) / 100)
    name = "routed" if args.routed else "ensemble"
    if args.experts is not None:
        metrics["members"], name = [i + 1 for i in experts], f"experts {args.experts}"
    if args.five_crop:
        metrics["crops"], name = crops, f"{name}, five crops"
    rows = {name: metrics}
    if bare is not None:
        rows = {name: metrics | bare, f"{name}, prior {args.test_prior}": metrics}
    classes = (data.class_counts, data.class_names, recipe.shots)
    for folder in filter(None, (args.plots, args.confusions)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if args.plots is not None:
        plot_metrics(Path(args.plots), rows, *classes)
    if args.confusions is not None:
        write_confusions(Path(args.confusions), counts.reduce(), *classes)
    if args.routed:
        metrics["threshold"] = threshold
    if chosen:
        metrics |= dict(macs_budget=args.macs_budget, chosen_on=chosen)
    if args.time:
        metrics |= dict(images_per_second=round(predict.images_per_second / crops, 1), inference=str(inference))
    if args.curve is not None:
        outcomes = collect_outcomes(model, test)
        metrics |= _write_curve(args, outcomes, macs, data.class_counts, recipe.shots, metrics)
        rows |= {f"{i + 1} expert{'s' * (i > 0)} always": point for i, point in enumerate(metrics["prefixes"])}
    if args.json:
        print_json(metrics | dict(class_names=data.class_names))
    else:
        _print(args, rows, metrics, data.class_names, device)


def _data_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in flags_given(args).items() if name != "model"}


def _check(args: argparse.Namespace) -> None:
    """InputError for flags that exclude each other or files that cannot be written."""
    threshold_given = "threshold" in flags_given(args)
    if args.macs_budget is not None:
        if not (math.isfinite(args.macs_budget) and args.macs_budget > 0):
            raise InputError(f"macs-budget={args.macs_budget}: expected MACs per image, such as 80e6.")
        if not args.routed:
            raise InputError("macs-budget chooses the router's threshold: pass --routed as well.")
        if threshold_given:
            raise InputError("macs-budget chooses the threshold: leave --threshold out.")
    if args.five_crop and (args.routed or args.curve is not None):
        raise InputError("five-crop averages all experts on every crop: leave --routed and --curve out.")
    check_prior_flags(args, args.shifted)
    if args.test_prior is not None and args.curve is not None:
        raise InputError("the curve is of the bare logits: leave --test-prior or --curve out.")
    check_threshold(threshold_given, args.routed)
    check_experts(args, args.routed or args.curve is not None)
    for name in ("plots", "confusions"):
        if (folder := getattr(args, name)) is not None:
            found = next((path for path in (Path(folder), *Path(folder).parents) if path.exists()), None)
            if found is None:
                raise InputError(f"{name}={folder}: there is no drive {Path(folder).anchor}")
            if not found.is_dir():
                raise InputError(f"{name}={folder}: {found} is a file, expected a folder.")
    if args.plots is not None and find_spec("matplotlib") is None:
        raise InputError("plots needs matplotlib: pip install matplotlib.")
    if args.curve is not None:
        path = Path(args.curve)
        if path.suffix not in (".png", ".csv"):
            raise InputError(f"curve={path}: expected a .png or a .csv file.")
        if not path.parent.is_dir():
            raise InputError(f"curve={path}: no folder {path.parent}.")
        if path.suffix == ".png" and find_spec("matplotlib") is None:
            raise InputError(f"curve={path}: a picture needs matplotlib (pip install matplotlib), a .csv does not.")


def _evaluate_priors(
    args: argparse.Namespace, predictions: list[Any], counts: CountAccumulator, data: Any, shots: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The metrics moved to the test prior, if one is given, and as predicted, which are None if none is.

    The accuracies on the shifted test sets are among the first.

    counts: a new accumulator for the predictions of the metrics.
    """
    logits = torch.cat([logits if logits.ndim == 2 else logits.mean(1) for logits, _, _ in predictions])
    trained_on = run_results(args.model).get("class_counts") or data.class_counts
    model_prior = model_log_prior(args.model_prior, args.model, trained_on, data.class_names)
    shift: Tensor | float = 0.0
    found: dict[str, Any] = {}
    bare = None
    if args.shifted:
        targets = torch.cat([targets for _, _, targets in predictions])
        found["shifted"] = shifted_accuracies(logits, targets, data.class_counts, model_prior)
    if args.test_prior is not None:
        as_predicted = CountAccumulator(counts.num_classes, counts.num_experts, counts.num_members)
        bare = metrics_of(predictions, as_predicted, data.class_counts, shots)
        found["without_test_prior"] = {key: bare[key] for key in (*GROUPS, "top5")}
        if args.test_prior == "estimate":
            prior = estimate_log_prior(logits, model_prior)
        else:
            prior = log_prior_of(args.test_prior, trained_on, data.class_names)
        shift, found["test_prior"] = prior - model_prior, prior.exp().tolist()
    moved = ((logits + shift, used, targets) for logits, used, targets in predictions)
    return metrics_of(moved, counts, data.class_counts, shots) | found, bare


def _choose_threshold(
    model: Ride, macs: Macs, data: Any, recipe: Recipe, holdout: float, batches: Any, macs_budget: float
) -> dict[str, Any]:
    """The best point within the budget on other images than the test set's.

    These are the validation split if it is used, else the fraction `holdout` that the run held out, if any, else a
    fifth of the training images: the model has seen those and is more confident on them, so that new images may use
    more experts.
    """
    unseen = holdout > 0
    if data.val is not None:
        images, unseen, source = data.val, True, "validation images"
    else:
        images = hold_out(data.train, holdout or 0.2, recipe.split_seed)[1]
        source = "training images" + (" that the run held out" if unseen else ", which the model has SEEN in training")
    outcomes = collect_outcomes(model, batches(images))
    curve = routing_curve(outcomes, macs, data.class_counts, outcomes.balanced_weights(), recipe.shots)
    point = point_for_budget(curve, macs_budget)
    return point | dict(images=len(images), seen_in_training=not unseen, source=source)


def _write_curve(
    args: argparse.Namespace, outcomes: Outcomes, macs: Macs, class_counts: Sequence[int], shots: tuple[int, int],
    metrics: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write the routing curve as a picture or a table -> {"curve", "prefixes"}.

    metrics: those of the router, if routed.
    """
    prefixes = prefix_points(outcomes, macs, class_counts, shots)
    curve = thin(routing_curve(outcomes, macs, class_counts, shots=shots))
    if args.curve.endswith(".png"):
        plot_routing(Path(args.curve), curve, prefixes, metrics if args.routed else None)
    else:
        write_text(Path(args.curve), curve_table(curve, prefixes))
    return dict(curve=curve, prefixes=prefixes)


def _print(
    args: argparse.Namespace, rows: dict[str, Any], metrics: dict[str, Any], names: Sequence[str], device: torch.device
) -> None:
    print(metrics_table(rows))
    print(f"{metrics['correct']} of {metrics['images']} test images correct")
    print(f"\n{groups_table(metrics)}")
    print(f"\n{classes_table(metrics)}")
    if metrics["confusions"]:
        print(f"\n{confusions_table(metrics, names)}")
    if (shifted := metrics.get("shifted")) is not None:
        print(f"\n{shifted_table(shifted)}")
        if skipped := [str(ratio) for ratio in RATIOS if ratio not in [row["ratio"] for row in shifted]]:
            print(f"no sets of ratio {', '.join(skipped)}: a class has fewer test images than that")
    if chosen := metrics.get("chosen_on"):
        over = ", above the budget" if metrics["macs"] > args.macs_budget else ""
        budget, there, here = map(millions, (args.macs_budget, chosen["macs"], metrics["macs"]))
        print(f"threshold {chosen['threshold']!r} for at most {budget} MMACs per image, chosen on {chosen['images']} "
              f"{chosen['source']}: {chosen['all']:.2f} % class-balanced at {there} MMACs there, {here} MMACs on the "
              f"test set{over}")  # fmt: skip
    if args.time:
        speed = f"{metrics['images_per_second']:,.1f} images/s"
        print(f"{speed} ({metrics['inference']}; {device}, {torch.get_num_threads()} threads)")
    if args.curve is not None:
        print(f"{len(metrics['curve'])} points of the routing curve in {args.curve}")
