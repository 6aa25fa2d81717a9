"""Inference options: chosen experts, folded BatchNorm, bf16, torch.compile, ONNX."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import InputError
from ..evaluation.evaluate import Predict, predictor
from ..hardware import bf16_pays, has_compiler
from ..models import Ride


@dataclass(frozen=True)
class Inference:
    """How predictions are computed; the defaults are the model's own arithmetic."""

    fuse: bool = False
    precision: str = "fp32"
    compile: bool = False
    runtime: str = "torch"

    def __str__(self) -> str:
        chosen = ["fuse"] * self.fuse + ["compile"] * self.compile
        return ", ".join([self.runtime, self.precision, *chosen])

    def check(self) -> None:
        """InputError for options that exclude each other or need something not installed."""
        if self.runtime == "onnx":
            if self.compile or self.precision != "fp32":
                raise InputError("runtime=onnx runs in fp32 and uncompiled: leave out --compile and --precision.")
            missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
            if missing:
                raise InputError(f"runtime=onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        if self.compile and not torch.cuda.is_available() and not has_compiler():
            raise InputError("compile needs a C++ compiler (g++) and Python.h: install both or leave --compile out.")
        if self.precision == "bf16" and not bf16_pays():
            print("notice: bf16 is not faster than fp32 on this machine", file=sys.stderr)


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """Add --routed, --experts and the options of `Inference`."""
    parser.add_argument("--routed", action="store_true", help="let the router decide how many experts run per image")
    parser.add_argument("--experts", metavar="I,J,…", help="average only these experts, numbered from 1, such as 1,3")
    group = parser.add_argument_group("inference (each option changes the last digits)")
    group.add_argument("--fuse", action="store_true", help="fold each BatchNorm into the convolution before it")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic (default: fp32)")
    group.add_argument(
        "--compile", action="store_true", dest="compiled", help="torch.compile; the first batches take about a minute"
    )  # `compile` in the namespace is a key of recipes, for training
    group.add_argument(
        "--runtime", choices=("torch", "onnx"), default="torch", help="onnx: export, then ONNX Runtime (default: torch)"
    )


def inference_of(args: argparse.Namespace) -> Inference:
    """The options given on the command line, checked."""
    inference = Inference(args.fuse, args.precision, args.compiled, args.runtime)
    inference.check()
    return inference


def check_experts(args: argparse.Namespace, routed: bool) -> None:
    """InputError for `--experts` with a router, or with an ONNX graph of all experts."""
    if args.experts is not None and (routed or args.runtime == "onnx"):
        other = "the ONNX graph averages all experts" if args.runtime == "onnx" else "the router chooses the experts"
        raise InputError(f"experts={args.experts}: {other}; leave --experts out.")


def check_threshold(given: bool, routed: bool) -> None:
    """InputError for a threshold without a router that reads it."""
    if given and not routed:
        raise InputError("threshold is the router's: pass --routed as well, or leave --threshold out.")


def chosen_experts(text: str | None, num_experts: int) -> list[int]:
    """Indices of experts numbered from 1, such as "1,3"; all of them for None."""
    if text is None:
        return list(range(num_experts))
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"experts={text!r}: expected numbers from 1, such as 1,3.") from None
    if len(set(numbers)) < len(numbers) or not all(1 <= i <= num_experts for i in numbers):
        raise InputError(f"experts={text}: expected different numbers from 1 to {num_experts}.")
    return [i - 1 for i in numbers]


def averaged_crops(predict: Predict) -> Predict:
    """The prediction function of five crops an image: images [5·B, 3, H, W], crop by crop -> mean logits [B, …].

    Logits are averaged, as those of experts are: the two means commute, and a shift of the prior moves both alike.
    """

    def of_crops(images: Tensor) -> tuple[Tensor, Tensor | None]:
        return predict(images)[0].unflatten(0, (5, -1)).mean(0), None

    return of_crops


def _conv_bn_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and the BatchNorm after each.

    convN and bnN, or neighbours in a Sequential.
    """
    children = list(module.named_children())
    if type(module) is nn.Sequential:
        pairs = [(a, b) for (a, _), (b, _) in pairwise(children)]
    else:
        pairs = [(name, f"bn{match[1]}") for name, _ in children if (match := re.fullmatch(r"conv(\d*)", name))]
    modules = dict(children)
    return [
        (conv, bn)
        for conv, bn in pairs
        if type(modules[conv]) is nn.Conv2d
        and type(modules.get(bn)) is nn.BatchNorm2d
        and modules[bn].track_running_stats
        and modules[bn].num_features == modules[conv].out_channels
    ]


def fuse_conv_bn(model: Ride) -> Ride:
    """A copy with BatchNorms folded into the convolutions before them, in eval mode.

    InputError for a network without such a pair.
    """
    fused, count = deepcopy(model).eval(), 0
    for module in list(fused.modules()):
        for conv, bn in _conv_bn_pairs(module):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
            setattr(module, bn, nn.Identity())
            count += 1
    if not count:
        raise InputError("fuse: this network has no BatchNorm right after a convolution: leave --fuse out.")
    return fused


def prepare(
    model: Ride,
    inference: Inference,
    routed: bool = False,
    threshold: float = 0.5,
    size: int | None = None,
    experts: Sequence[int] | None = None,
) -> Predict:
    """The prediction function of a model under these options.

    size: image size of an ONNX export, the model's own by default; experts: indices whose logits are returned one by
    one (not by ONNX, whose graph holds their mean).
    """
    if inference.fuse:
        model = fuse_conv_bn(model)
    if inference.runtime == "onnx":
        return _onnx_predictor(model, routed, threshold, size)
    predict = (_compiled_predictor if inference.compile else predictor)(model, routed, threshold, experts)
    if inference.precision == "fp32":
        return predict
    device = next(model.parameters()).device.type

    def in_bf16(images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits, used = predict(images)
        return logits.float(), used

    return in_bf16


def _compiled_predictor(model: Ride, routed: bool, threshold: float, experts: Sequence[int] | None) -> Predict:
    if not routed:
        return torch.compile(predictor(model, experts=experts))
    model = deepcopy(model)
    model.trunk = torch.compile(model.trunk)
    for expert in model.experts:
        expert.forward = torch.compile(expert.forward, dynamic=True)  # it runs on any number of samples
    return predictor(model, routed, threshold)


def _onnx_predictor(model: Ride, routed: bool, threshold: float, size: int | None) -> Predict:
    from .export import export
    from .onnx_driver import OnnxRouted, load_session

    with tempfile.TemporaryDirectory() as temporary:
        folder = export(model, Path(temporary) / "model", "driver" if routed else "none", threshold, size)
        threads = torch.get_num_threads()
        if routed:
            run = OnnxRouted(folder, threshold, threads)
        else:
            session = load_session(folder / "model.onnx", threads)

    def predict(images: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = images.float().cpu().contiguous().numpy()
        logits, used = run(pixels) if routed else (*session.run(None, {"images": pixels}), None)
        logits = torch.from_numpy(logits).to(images.device)
        return logits, None if used is None else torch.from_numpy(used).to(images.device)

    return predict


class Timed:
    """A prediction function with a stopwatch around its forward passes."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.calls: list[tuple[int, float]] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        started = time.perf_counter()
        predictions = self.predict(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        self.calls.append((len(images), time.perf_counter() - started))
        return predictions

    @property
    def images_per_second(self) -> float:
        """Over all calls but the first of each batch size, a warm-up that may compile; over all if no other is left."""
        first = {size: i for i, (size, _) in reversed([*enumerate(self.calls)])}
        calls = [call for i, call in enumerate(self.calls) if first[call[0]] != i] or self.calls
        return sum(images for images, _ in calls) / sum(seconds for _, seconds in calls)
