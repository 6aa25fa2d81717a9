"""Show, check or save a long-tailed data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..data.check import check_installation, format_installation
from ..data.datasets import LISTED, NAMES_HELP
from ..data.hub import is_saved
from ..data.load import load_longtail
from ..data.readable import find_unreadable
from ..data.save import save_longtail
from ..errors import InputError, RunError
from ..inference.load import data_recipe
from ..priors import shot_groups
from ..training.arguments import add_flags, flags_given, keys_of
from ..training.recipe import Recipe
from .process import print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("datasets", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("action", choices=("show", "check", "save"))
    parser.add_argument("subject", metavar="NAME", help=NAMES_HELP)
    parser.add_argument("--output", metavar="DIR", help="save: a new folder for the selected images")
    parser.add_argument(
        "--max-side", type=int, metavar="N",
        help="save: shrink larger images to N pixels at their longer side, as JPEGs; twice the image size loses little",
    )  # fmt: skip
    parser.add_argument("--recipe", metavar="NAME|FILE", help="take the other settings from this recipe")
    parser.add_argument("--all", action="store_true", help="list every class, or every missing image")
    parser.add_argument(
        "--decode", action="store_true",
        help=f"check {', '.join(LISTED)}: decode every image as well",
    )  # fmt: skip
    add_flags(parser, [name for name in keys_of("data") if name not in ("dataset", "holdout", "augment")])


def run(args: argparse.Namespace) -> None:
    recipe = data_recipe(args.recipe, None, flags_given(args) | dict(dataset=args.subject))
    if args.action != "save" and args.max_side is not None:
        raise InputError(f"--max-side shrinks the images that save writes: leave it out of {args.action}.")
    if args.action == "save":
        return _save(args, recipe)
    installed: dict[str, Any] = {}
    if args.action == "check" and args.subject in LISTED and not is_saved(recipe.data_dir):
        installed = _check_published(args, recipe, print_facts=not (args.json and args.decode))
        if not args.decode:
            return
    if args.action == "check" and recipe.streaming:
        raise InputError("check reads every image, a stream only those of an epoch: leave --streaming out.")
    data = load_longtail(**recipe.data_args)
    if data.notice:
        print(data.notice, file=sys.stderr)
    counts = data.class_counts
    groups = {name: int(mask.sum()) for name, mask in shot_groups(counts, *recipe.shots).items()}
    facts = dict(name=data.name, classes=data.num_classes, train=len(data.train), test=len(data.test))
    facts |= dict(class_counts=counts, **groups)
    if args.action == "check":
        sets = [data.train, data.test, *([] if data.val is None else [data.val])]
        found = [find_unreadable(images, recipe.workers) for images in sets]
        facts["unreadable"] = unreadable = [error for some in found for _, error in some]
    if args.json:
        print_json(installed | facts)
    else:
        print(f"{data.name}: {facts['train']:,} training and {facts['test']:,} test images, {data.num_classes} classes")
        print(f"images per class: {max(counts)} to {min(counts)}; classes by shot: {groups}")
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
    """Save the selected images of a data set and print what was saved."""
    if args.output is None:
        raise InputError("datasets save needs --output DIR, a new folder.")
    data = save_longtail(args.output, max_side=args.max_side, workers=recipe.workers, **recipe.data_args)
    if data.notice:
        print(data.notice, file=sys.stderr)
    facts = dict(output=args.output, train=len(data.train), test=len(data.test), val=len(data.val) if data.val else 0)
    if args.json:
        return print_json(facts)
    print(f"{args.output}: {facts['train']:,} training, {facts['test']:,} test and {facts['val']:,} validation images")
    print(f"read it with --dataset {args.output}, or with --data-dir {args.output} in place of {data.name}")


def _check_published(args: argparse.Namespace, recipe: Recipe, print_facts: bool) -> dict[str, Any]:
    """Check the installed files of a data set against its published lists; returns the facts.

    print_facts: as JSON even if nothing is missing; text is always printed.
    RunError if something is missing.
    """
    folders = [None if path is None else Path(path).expanduser() for path in (recipe.data_dir, recipe.annotations)]
    installed = check_installation(args.subject, *folders)
    if args.json:
        if print_facts or installed["problems"]:
            print_json(installed)
    else:
        print(format_installation(installed, sys.maxsize if args.all else 10))
    if installed["problems"]:
        raise RunError(f"{args.subject} is not as published: {len(installed['problems'])} problems, see above")
    checked = "every list and image is" if installed["root"] else "every list is"
    print(f"{checked} as published", file=sys.stderr)
    return installed
