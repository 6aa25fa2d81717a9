"""python -m ride_timm evaluate | predict | flops | datasets | models"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs

from .checkpoint import create_ride_model, load_model
from .errors import InputError, RunError
from .flops import Macs, count_macs
from .launch import Parser, exit_code, set_threads
from .priors import shot_groups
from .recipe import Recipe, add_flags, available, flags_given, keys_of, load_recipe

_RECIPE_OF = {"fashion_lt": "fashion_lt", "cifar10": "cifar10_lt", "cifar100": "cifar100_lt"}


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _run_folder(spec: str) -> Path:
    return Path(spec.removeprefix("local-dir:"))


def _recipe_for(args: argparse.Namespace) -> Recipe:
    """The recipe to take the data from: named, the run's own, or the one that fits the data set."""
    own = _run_folder(args.model) / "recipe.yaml" if getattr(args, "model", None) else None
    flags = flags_given(args)
    flags.pop("model", None)
    if args.recipe:
        recipe = load_recipe(args.recipe)
    elif own is not None and own.is_file():
        recipe = load_recipe(own)
    elif flags.get("dataset") in _RECIPE_OF:
        recipe = load_recipe(_RECIPE_OF[flags["dataset"]])
    elif "dataset" in flags:
        recipe = Recipe(augment="imagenet")
    else:
        raise InputError(f"what to read? Name --dataset or --recipe (there are {', '.join(available())}).")
    return recipe.override(flags)


def _load_data(recipe: Recipe) -> Any:
    from .data.sources import load_longtail

    return load_longtail(
        recipe.dataset,
        recipe.data_dir,
        imb_type=recipe.imb_type,
        imb_factor=recipe.imb_factor,
        seed=recipe.split_seed,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        test_split=recipe.test_split,
    )


def evaluate_command(args: argparse.Namespace) -> None:
    from .data.loader import make_loader
    from .data.transforms import get_policy
    from .evaluation import evaluate, evaluation_batch, with_macs
    from .metrics import format_table

    recipe = _recipe_for(args)
    model = load_model(args.model).to(memory_format=torch.channels_last)  # as the training script holds it
    if args.routed and model.router is None:
        raise InputError(f"{args.model} has no router: leave --routed out, or train stage two.")
    data = _load_data(recipe)
    if data.num_classes != model.num_classes:
        raise InputError(f"{args.model} has {model.num_classes} classes, the data set {data.name} {data.num_classes}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = get_policy(recipe.augment).input_size(recipe.input_size)
    where = dict(input_size=size, device=device, num_workers=recipe.workers)
    batches = make_loader(data.test, recipe.augment, train=False, batch_size=evaluation_batch(size), seed=0, **where)
    metrics = evaluate(model.to(device), batches, data.class_counts, args.routed, recipe.threshold)
    metrics = with_macs(metrics, model, (model.in_chans, size, size)) | dict(images=len(data.test))
    metrics["correct"] = round(metrics["all"] * len(data.test) / 100)
    if args.json:
        return _print_json(metrics)
    print(format_table({"routed" if args.routed else "ensemble": metrics}))
    print(f"{metrics['correct']} of {metrics['images']} test images right")


@torch.inference_mode()
def predict_command(args: argparse.Namespace) -> None:
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    images = []
    for path in args.images:
        try:
            images.append(Image.open(path).convert("RGB"))
        except OSError as error:
            raise InputError(f"image {path} cannot be read: {error}") from error
    model = load_model(args.model)
    if args.routed and model.router is None:
        raise InputError(f"{args.model} has no router: leave --routed out, or train stage two.")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    predictions = []
    for path, image in zip(args.images, images, strict=True):
        batch = transform(image)[None]
        logits, used = model.forward_routed(batch, args.threshold) if args.routed else (model(batch), None)
        top = logits.softmax(1)[0].topk(min(5, model.num_classes))
        choices = [
            dict(label=names[i], index=i, probability=round(p, 6))
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        routing = dict(experts_used=int(used)) if used is not None else {}
        predictions.append(dict(image=str(path), **choices[0], **routing, top=choices))
    if args.json:
        return _print_json(predictions)
    for found in predictions:
        experts = f"  ({found['experts_used']} of {model.num_experts} experts)" if args.routed else ""
        print(f"{found['image']}: {found['label']} {100 * found['probability']:.1f} %{experts}")


def _shares(text: str) -> list[float]:
    try:
        return [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise InputError(f"experts-used={text!r}: expected percentages such as 40.99,9.47,49.54.") from None


def flops_command(args: argparse.Namespace) -> None:
    flags = flags_given(args)
    recipe = Recipe().override(flags)
    kwargs = {name: getattr(recipe, name) for name in flags if name != "input_size"}
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    shares = _shares(args.experts_used) if args.experts_used else None
    if shares:
        kwargs["router"] = True
    model = create_ride_model(args.subject, **kwargs)
    size = recipe.input_size or model.pretrained_cfg["input_size"][-1]
    macs: Macs = count_macs(model, (model.in_chans, size, size))
    found = dict(macs=round(macs.ensemble), params=macs.params, expert_macs=[round(m) for m in macs.experts])
    if shares:
        found["expected_macs"] = round(macs.expected(shares))
    if args.json:
        return _print_json(found)
    print(f"{args.subject}, {model.num_experts} experts, {model.num_classes} classes, {size} x {size} pixels")
    print(f"parameters        {macs.params:>16,}")
    print(f"MACs              {found['macs']:>16,}   (trunk {round(macs.trunk):,})")
    for i, own in enumerate(found["expert_macs"]):
        print(f"  expert {i + 1}        {own:>16,}")
    if shares:
        print(f"expected, routed  {found['expected_macs']:>16,}")


def datasets_command(args: argparse.Namespace) -> None:
    args.dataset = args.subject
    recipe = _recipe_for(args)
    data = _load_data(recipe)
    counts = data.class_counts
    groups = {name: int(mask.sum()) for name, mask in shot_groups(counts).items()}
    found = dict(name=data.name, classes=data.num_classes, train=len(data.train), test=len(data.test))
    found |= dict(class_counts=counts, **groups)
    if args.action == "check":
        found["unreadable"] = unreadable = _unreadable(data)
    if args.json:
        _print_json(found)
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


def _unreadable(data: Any) -> list[str]:
    found = []
    for part in (data.train, data.test):
        for i in range(len(part)):
            try:
                part[i]
            except RunError as error:
                found.append(str(error))
    return found


def models_command(args: argparse.Namespace) -> None:
    rows = []
    for name in timm.list_models("ride*"):
        model = timm.create_model(name, device="meta")
        cfg = model.pretrained_cfg
        tags = sorted(tag.partition(".")[2] for tag in get_arch_pretrained_cfgs(name))
        params = sum(parameter.numel() for parameter in model.parameters())
        rows.append(dict(name=name, params=params, input_size=cfg["input_size"][-1], tags=tags))
    if args.json:
        return _print_json(rows)
    print(f"{'name':<20} {'parameters':>12} {'input':>6}  tags")
    for row in rows:
        print(f"{row['name']:<20} {row['params']:>12,} {row['input_size']:>6}  {', '.join(row['tags'])}")


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
    add_flags(evaluate, [name for name in keys_of("data") if name != "holdout"] + ["threshold", "workers"])

    predict = command("predict", predict_command, "classes of image files")
    predict.add_argument("--model", required=True, metavar="SPEC", help=spec)
    predict.add_argument("--routed", action="store_true", help="let the router choose the experts")
    predict.add_argument("--threshold", type=float, default=0.5, metavar="X", help="gate probability that goes on")
    predict.add_argument("images", nargs="+", metavar="IMAGE")

    flops = command("flops", flops_command, "multiply-accumulates of a network, by expert and under routing")
    flops.add_argument("subject", metavar="MODEL")
    flops.add_argument("--num-classes", type=int, metavar="C")
    flops.add_argument("--experts-used", metavar="P1,P2,…", help="percentages of images that use 1, 2, … experts")
    model_keys = [name for name in keys_of("model") if name != "model"]
    add_flags(flops, [*model_keys, "input_size", "top_choices_num", "share_expert_help_pred_fc"])

    datasets = command("datasets", datasets_command, "show a long-tailed data set, or check that all of it can be read")
    datasets.add_argument("action", choices=("show", "check"))
    datasets.add_argument("subject", metavar="NAME", help="fashion_lt, cifar10, cifar100, a Hub id or a path")
    datasets.add_argument("--recipe", metavar="NAME|FILE", help="take the other settings from this recipe")
    datasets.add_argument("--all", action="store_true", help="list every class")
    add_flags(datasets, [name for name in keys_of("data") if name not in ("dataset", "holdout", "augment")])

    command("models", models_command, "list the networks")
    return parser


def main(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    set_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
