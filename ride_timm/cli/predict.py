"""Classify image files."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ..data.augment.images import upright
from ..errors import InputError
from ..inference.load import SPEC, load_ride, threshold_for
from ..inference.options import (
    add_inference_flags,
    check_experts,
    check_threshold,
    chosen_experts,
    inference_of,
    prepare,
)
from .process import print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("predict", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="SPEC", help=SPEC)
    parser.add_argument("--threshold", type=float, metavar="X", help="gate probability (default: the run's, or 0.5)")
    add_inference_flags(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size")


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    check_experts(args, args.routed)
    inference = inference_of(args)
    images = [_open(path) for path in args.images]
    model = load_ride(args.model, args.routed)
    if model.in_chans not in (1, 3):
        raise InputError(f"{args.model} takes {model.in_chans} channels: image files have 1 (grey) or 3 (RGB).")
    routed = args.routed or model.routed
    check_experts(args, routed)
    check_threshold(args.threshold is not None, routed)
    experts = chosen_experts(args.experts, model.num_experts) if args.experts is not None else None
    threshold = threshold_for(args.model, args.threshold)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    predict = prepare(model.to(device), inference, routed, threshold, config["input_size"][-1], experts)
    predictions = []
    for path, image in zip(args.images, images, strict=True):
        logits, used = predict(transform(image if model.in_chans == 3 else image.convert("L"))[None].to(device))
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
    for row in predictions:
        experts_used = f"  ({row['experts_used']} of {model.num_experts} experts)" if routed else ""
        print(f"{row['image']}: {row['label']} {100 * row['probability']:.1f} %{experts_used}")


def _open(path: str) -> Image.Image:
    try:
        return upright(Image.open(path))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from error
