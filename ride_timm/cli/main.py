"""python -m ride_timm evaluate | predict | export | flops | datasets | models | sweep"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..data.datasets import LISTED, NAMES_HELP
from ..data.hub import is_saved
from ..errors import InputError, RunError
from ..evaluation.macs import Macs, count_macs
from ..hardware import keep_memory, set_threads
from ..inference.export import KINDS
from ..inference.options import add_inference_flags
from ..models.load import check_images, create_ride_model
from ..priors import shot_groups
from ..training.arguments import Parser, add_flags, flags_given, keys_of
from ..training.recipe import Recipe
from .commands import evaluate_command, export_command, load_data, predict_command, print_json, recipe_for
from .sweep import sweep_command


def _shares(text: str) -> list[float]:
    """Percentages, rounded ones among them, as fractions that sum to 1."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"experts-used={text!r}: expected percentages such as 40.99,9.47,49.54.") from None
    total = sum(shares)
    if not (all(share >= 0 for share in shares) and abs(total - 100) <= 0.2):  # nor NaN
        raise InputError(f"experts-used: {text} sum to {total:g}: expected percentages that sum to 100, none below 0.")
    return [share / total for share in shares]


def flops_command(args: argparse.Namespace) -> None:
    flags = flags_given(args)
    recipe = Recipe().override(flags)
    kwargs = {name: getattr(recipe, name) for name in flags if name != "input_size"}
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    shares = _shares(args.experts_used) if args.experts_used else None
    if shares:
        kwargs["router"] = True
    model = create_ride_model(args.subject, recipe.input_size, **kwargs)
    size = recipe.input_size or model.pretrained_cfg["input_size"][-1]
    check_images(model, (model.in_chans, size, size), args.subject)
    macs: Macs = count_macs(model, (model.in_chans, size, size))
    found = dict(macs=round(macs.ensemble), params=macs.params, expert_macs=[round(m) for m in macs.experts])
    if shares:
        found["expected_macs"] = round(macs.expected(shares))
    if args.json:
        return print_json(found)
    print(f"{args.subject}, {model.num_experts} experts, {model.num_classes} classes, {size} x {size} pixels")
    print(f"parameters        {macs.params:>16,}")
    print(f"MACs              {found['macs']:>16,}   (trunk {round(macs.trunk):,})")
    for i, own in enumerate(found["expert_macs"]):
        print(f"  expert {i + 1}        {own:>16,}")
    if shares:
        print(f"expected, routed  {found['expected_macs']:>16,}")


def datasets_command(args: argparse.Namespace) -> None:
    args.dataset = args.subject
    recipe = recipe_for(args)
    if args.action == "save":
        return _save(args, recipe)
    if args.action == "check" and args.subject in LISTED and not is_saved(recipe.data_dir):
        _check_published(args, recipe)
        if not args.decode:
            return
    if args.action == "check" and recipe.streaming:
        raise InputError("check reads every image, which a stream does not hold: leave --streaming out.")
    data = load_data(recipe, recipe.use_val)
    counts = data.class_counts
    groups = {name: int(mask.sum()) for name, mask in shot_groups(counts, *recipe.shots).items()}
    found = dict(name=data.name, classes=data.num_classes, train=len(data.train), test=len(data.test))
    found |= dict(class_counts=counts, **groups)
    if args.action == "check":
        found["unreadable"] = unreadable = _unreadable(data)
    if args.json:
        print_json(found)
    else:
        print(f"{data.name}: {found['train']:,} training and {found['test']:,} test images, {data.num_classes} classes")
        print(f"images a class: {max(counts)} to {min(counts)}; classes by shot: {groups}")
        names = list(data.class_names)
        for name, count in list(zip(names, counts, strict=True))[: None if args.all else 20]:
            print(f"  {name:<30} {count:>7}")
        if not args.all and len(names) > 20:
            print(f"  … {len(names) - 20} more (--all)")
    if args.action == "check":
        if unreadable:
            raise RunError(f"{len(unreadable)} images cannot be read, the first: {unreadable[0]}")
        print("every image can be read", file=sys.stderr)


def _save(args: argparse.Namespace, recipe: Recipe) -> None:
    """Save the selected images of a data set; print the new folder and its images."""
    from ..data.save import save_longtail

    if args.output is None:
        raise InputError("datasets save needs --output DIR, a new folder.")
    data = save_longtail(args.output, **recipe.data_args)
    found = dict(output=args.output, train=len(data.train), test=len(data.test), val=len(data.val) if data.val else 0)
    if args.json:
        return print_json(found)
    print(f"{args.output}: {found['train']:,} training, {found['test']:,} test and {found['val']:,} validation images")
    print(f"read it with --dataset {args.output}, or with --data-dir {args.output} in place of {data.name}")


def _check_published(args: argparse.Namespace, recipe: Recipe) -> None:
    """Print what is there of a data set with known lists; RunError where something is missing."""
    from ..data.check import check_installation, format_installation

    folders = [None if path is None else Path(path).expanduser() for path in (recipe.data_dir, recipe.annotations)]
    found = check_installation(args.subject, *folders)
    if args.json:
        print_json(found)
    else:
        print(format_installation(found, sys.maxsize if args.all else 10))
    if found["problems"]:
        raise RunError(f"{args.subject} is not as published: {len(found['problems'])} problems, see above")
    what = "every list and image is" if found["root"] else "every list is"
    print(f"{what} as published", file=sys.stderr)


def _unreadable(data: Any) -> list[str]:
    found = []
    for part in (data.train, data.test, *([] if data.val is None else [data.val])):
        for i in range(len(part)):
            try:
                part[i]
            except RunError as error:
                found.append(str(error))
    return found


def models_command(args: argparse.Namespace) -> None:
    from .models import catalogue, format_catalogue

    rows = catalogue()
    return print_json(rows) if args.json else print(format_catalogue(rows))


def build_parser() -> Parser:
    parser = Parser(prog="python -m ride_timm", description="RIDE for timm.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
        return sub

    spec = "run folder, authors' .pth, or anything timm.create_model takes"
    evaluate = command("evaluate", evaluate_command, "accuracy on a test set, by shot group")
    evaluate.add_argument("--model", required=True, metavar="SPEC", help=spec)
    evaluate.add_argument("--recipe", metavar="NAME|FILE", help="take the data from this recipe")
    evaluate.add_argument("--routed", action="store_true", help="let the router choose the experts")
    evaluate.add_argument(
        "--macs-budget", type=float, metavar="MACS",
        help="with --routed: choose the threshold for at most so many MACs an image, on held-out training images if "
        "the run has some, else on training images that it has seen",
    )  # fmt: skip
    experts = "average these experts alone, numbered from 0, such as 0,2"
    evaluate.add_argument("--experts", metavar="I,J,…", help=experts)
    evaluate.add_argument("--plots", metavar="DIR", help="draw head_to_tail.png, reliability.png and experts.png there")
    evaluate.add_argument("--curve", metavar="FILE", help="accuracy against MACs by threshold, as .png or .csv")
    evaluate.add_argument("--time", action="store_true", help="images per second of the forward passes")
    add_inference_flags(evaluate)
    add_flags(evaluate, [name for name in keys_of("data") if name != "holdout"] + ["threshold", "workers"])

    predict = command("predict", predict_command, "classes of image files")
    predict.add_argument("--model", required=True, metavar="SPEC", help=spec)
    predict.add_argument("--routed", action="store_true", help="let the router choose the experts")
    predict.add_argument("--experts", metavar="I,J,…", help=experts)
    predict.add_argument("--threshold", type=float, metavar="X", help="gate probability (default: the run's, or 0.5)")
    add_inference_flags(predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE")

    export = command("export", export_command, "ONNX graphs, with or without routing, and a manifest")
    export.add_argument("--model", required=True, metavar="SPEC", help=spec)
    export.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--routed", choices=tuple(KINDS), default="none",
        help="none: the ensemble in one graph; masked: routing's answers in one graph, at the ensemble's cost; "
        "driver: a graph for each part and a driver that runs an expert only on its samples (default: none)",
    )  # fmt: skip
    export.add_argument("--threshold", type=float, metavar="X", help="gate probability (default: the run's, or 0.5)")
    export.add_argument("--input-size", type=int, metavar="N", help="side of the images (default: the model's)")

    flops = command("flops", flops_command, "multiply-accumulates of a network, by expert and under routing")
    flops.add_argument("subject", metavar="MODEL")
    flops.add_argument("--num-classes", type=int, metavar="C")
    flops.add_argument("--experts-used", metavar="P1,P2,…", help="percentages of images that use 1, 2, … experts")
    model_keys = [name for name in keys_of("model") if name != "model"]
    add_flags(flops, [*model_keys, "input_size", "top_choices_num", "share_expert_help_pred_fc"])

    datasets = command("datasets", datasets_command, "show, check or save a long-tailed data set")
    datasets.add_argument("action", choices=("show", "check", "save"))
    datasets.add_argument("subject", metavar="NAME", help=NAMES_HELP)
    datasets.add_argument("--recipe", metavar="NAME|FILE", help="take the other settings from this recipe")
    datasets.add_argument("--output", metavar="DIR", help="save: a new folder for the selected images")
    datasets.add_argument("--all", action="store_true", help="list every class, or every missing image")
    datasets.add_argument(
        "--decode", action="store_true",
        help=f"check {', '.join(LISTED)}: read every image, not only look for it (of others all are read)",
    )  # fmt: skip
    add_flags(datasets, [name for name in keys_of("data") if name not in ("dataset", "holdout", "augment")])

    command("models", models_command, "list the networks")

    sweep = command("sweep", sweep_command, "train recipes with seeds one after another, resumable; one table")
    sweep.add_argument("--recipes", nargs="+", required=True, metavar="NAME|FILE")
    sweep.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of every recipe (default: 0)"
    )
    sweep.add_argument("--output", default="runs/sweep", metavar="DIR", help="where the runs and the table go")
    sweep.add_argument("--script", metavar="FILE", help="the training script (default: train_accelerate.py here)")
    sweep.add_argument("--config", metavar="FILE", help="launch with this configuration of accelerate")
    sweep.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of the training script for every run")
    return parser


def main(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    set_threads(args.threads)
    keep_memory()
    args.run(args)
