"""Count the MACs of a network, by expert and under routing."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from ..evaluation.macs import count_macs
from ..models.load import check_images, create_ride_model
from ..training.arguments import add_flags, flags_given, keys_of
from ..training.recipe import Recipe
from .process import print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("flops", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("subject", metavar="MODEL", help="a network of `python -m ride_timm models`")
    parser.add_argument("--num-classes", type=int, metavar="C", help="number of classes")
    parser.add_argument("--experts-used", metavar="P1,P2,…", help="percentages of images that use 1, 2, … experts")
    without_effect = ("model", "backbone_weights", "grad_checkpointing")
    model_keys = [name for name in keys_of("model") if name not in without_effect]
    add_flags(parser, [*model_keys, "input_size", "top_choices_num", "share_expert_help_pred_fc"])


def run(args: argparse.Namespace) -> None:
    flags = flags_given(args)
    recipe = Recipe().override(flags)
    kwargs = {name: getattr(recipe, name) for name in flags if name != "input_size"}
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    used = _fractions(args.experts_used) if args.experts_used else None
    if used:
        kwargs["router"] = True
    model = create_ride_model(args.subject, recipe.input_size, **kwargs)
    size = recipe.input_size or model.pretrained_cfg["input_size"][-1]
    check_images(model, (model.in_chans, size, size), args.subject)
    macs = count_macs(model, (model.in_chans, size, size))
    counts = dict(macs=round(macs.ensemble), params=macs.params, expert_macs=[round(own) for own in macs.experts])
    if used:
        counts["expected_macs"] = round(macs.expected(used))
    if args.json:
        return print_json(counts)
    print(f"{args.subject}, {model.num_experts} experts, {model.num_classes} classes, {size} x {size} pixels")
    print(f"parameters        {macs.params:>16,}")
    print(f"MACs              {counts['macs']:>16,}   (trunk {round(macs.trunk):,})")
    for i, own in enumerate(counts["expert_macs"]):
        print(f"  expert {i + 1}        {own:>16,}")
    if used:
        print(f"expected, routed  {counts['expected_macs']:>16,}")


def _fractions(text: str) -> list[float]:
    """Fractions that sum to 1 from percentages, which may be rounded."""
    try:
        percentages = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"experts-used={text!r}: expected percentages such as 40.99,9.47,49.54.") from None
    total = sum(percentages)
    if not (all(value >= 0 for value in percentages) and abs(total - 100) <= 0.2):  # nor NaN
        raise InputError(f"experts-used: {text} sum to {total:g}: expected percentages that sum to 100, none below 0.")
    return [value / total for value in percentages]
