"""Classify image files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from ..errors import InputError
from ..evaluation.evaluate import evaluation_batch
from ..evaluation.test_prior import estimate_log_prior, log_prior_of
from ..hardware import choose_device, usable_cores
from ..inference.image_files import ImageFiles, find_images
from ..inference.load import SPEC, check_channels, load_ride, threshold_for
from ..inference.model_prior import add_prior_flags, check_prior_flags, model_log_prior, run_results
from ..inference.options import (
    add_inference_flags,
    check_experts,
    check_threshold,
    chosen_experts,
    inference_of,
    prepare,
)
from ..inference.predict import Batch, Counted, FeatureTap, predict_batches, predicted_rows
from ..inference.writers import Columns, check_output, print_json_rows, print_rows, write_rows
from ..models.release import class_names
from ..progress import progress_bar


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("predict", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="SPEC", help=SPEC)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a table to FILE.csv, .jsonl or .parquet")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="most probable classes per image (default: 5, or 1 as printed text)"
    )
    parser.add_argument("--features", action="store_true", help="add the pooled features of the experts to each row")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch (default: 128; 500 up to 64 pixels)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes (default: one a core, at most 8)")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: the GPU where there is one)")
    parser.add_argument("--threshold", type=float, metavar="X", help="gate probability (default: the run's, or 0.5)")
    add_prior_flags(parser)
    add_inference_flags(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files, folders, patterns such as '*.jpg', or - for paths on stdin"
    )


def run(args: argparse.Namespace) -> None:
    check_experts(args, args.routed)
    check_prior_flags(args)
    inference = inference_of(args)
    _check(args)
    device = choose_device(args.device)
    paths = find_images(args.images)
    model = load_ride(args.model, args.routed)
    check_channels(model, args.model)
    routed = args.routed or model.routed
    check_experts(args, routed)
    check_threshold(args.threshold is not None, routed)
    if args.features and (routed or inference.runtime == "onnx" or inference.compile):
        raise InputError("features are those of all experts, uncompiled: leave out --routed, --runtime and --compile.")
    experts = chosen_experts(args.experts, model.num_experts)
    threshold = threshold_for(args.model, args.threshold)

    config = resolve_model_data_config(model)
    size = config["input_size"][-1]
    names = class_names(model)
    tap = FeatureTap(model, experts) if args.features else None
    one_by_one = None if args.experts is None else experts
    model = model.to(device, memory_format=torch.channels_last)
    predict = prepare(model, inference, routed, threshold, size, one_by_one)
    files = ImageFiles(paths, create_transform(**config, is_training=False), grey=model.in_chans == 1)
    batch_size = min(args.batch_size or evaluation_batch(size), len(paths))
    workers = _workers(len(paths) > batch_size) if args.workers is None else args.workers
    as_text = args.output is None and not args.json
    top_k = min(args.top_k or (1 if as_text else 5), model.num_classes)
    batches: Iterable[Batch] = predict_batches(files, predict, batch_size, workers, device, tap)
    shift: Tensor | float = 0.0
    if args.test_prior is not None:
        batches, shift = _to_test_prior(args, names, batches)
    counted = Counted(predicted_rows(batches, paths, names, top_k, shift))
    # on a terminal the printed rows show the progress
    bar = progress_bar(counted, "predict", len(paths), unit="image", disable=None if args.output or _piped() else True)
    if args.output is not None:
        write_rows(bar, args.output, Columns(top_k, routed, args.features))
    elif args.json:
        print_json_rows(bar)
    else:
        print_rows(bar, model.num_experts)
    counted.report()


def _to_test_prior(
    args: argparse.Namespace, names: Sequence[str], batches: Iterable[Batch]
) -> tuple[Iterable[Batch], Tensor]:
    """The batches and what moves their logits to the test prior, [C]; an estimate needs all batches first."""
    class_counts = run_results(args.model).get("class_counts")
    model_prior = model_log_prior(args.model_prior, args.model, class_counts, names)
    if args.test_prior != "estimate":
        return batches, log_prior_of(args.test_prior, class_counts, names) - model_prior
    batches = list(batches)
    logits = [batch.logits for batch in batches if batch.logits is not None]
    return batches, (estimate_log_prior(torch.cat(logits), model_prior) if logits else model_prior) - model_prior


def _check(args: argparse.Namespace) -> None:
    for name, low in (("top_k", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise InputError(f"{name.replace('_', '-')}={value}: expected {low} or more.")
    if args.output is not None:
        check_output(args.output, args.features)
        if args.json:
            raise InputError("output and json exclude each other: --output FILE.jsonl writes JSON lines.")
    elif args.features and not args.json:
        raise InputError("features need --output FILE.jsonl or FILE.parquet, or --json.")


def _workers(several_batches: bool) -> int:
    return min(8, usable_cores()) if several_batches else 0


def _piped() -> bool:
    return not sys.stdout.isatty()
