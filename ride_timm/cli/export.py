"""Write ONNX graphs, with or without the router, and a manifest."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from ..inference.export import KINDS, check_export, export
from ..inference.load import SPEC, load_ride, threshold_for
from ..inference.options import check_threshold
from ..models.load import check_images
from .process import print_files


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("export", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="SPEC", help=SPEC)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--routed", choices=tuple(KINDS), default="none",
        help="none: one graph of the ensemble; masked: one graph of the router's predictions, at the ensemble's cost; "
        "driver: one graph per trunk, expert and gate, and a driver that runs an expert only on the samples sent to it "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, metavar="X", help="gate probability (default: the run's, or 0.5)")
    parser.add_argument("--input-size", type=int, metavar="N", help="image size (default: the model's)")


def run(args: argparse.Namespace) -> None:
    check_export(args.output)
    check_threshold(args.threshold is not None, args.routed != "none")
    if args.input_size is not None and args.input_size < 8:
        raise InputError(f"input-size={args.input_size}: expected 8 or more pixels.")
    model = load_ride(args.model, args.routed != "none")
    size = args.input_size or model.pretrained_cfg["input_size"][-1]
    threshold = threshold_for(args.model, args.threshold)
    check_images(model, (model.in_chans, size, size), args.model)
    folder = export(model, args.output, args.routed, threshold, args.input_size)
    print_files(folder, args.json)
