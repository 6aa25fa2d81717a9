"""Faster ways to a model's answers: folded BatchNorm, bfloat16, torch.compile, ONNX Runtime. All are asked for."""

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
from ..evaluation.evaluate import Answer, answer_of
from ..hardware import bf16_pays, has_compiler
from ..models import Ride


@dataclass(frozen=True)
class Inference:
    """How to compute; the defaults leave every number as it is."""

    fuse: bool = False
    precision: str = "fp32"
    compile: bool = False
    runtime: str = "torch"

    def __str__(self) -> str:
        chosen = ["fuse"] * self.fuse + ["compile"] * self.compile
        return ", ".join([self.runtime, self.precision, *chosen])

    def check(self) -> None:
        """InputError for options that do not go together, or whose tools are not installed."""
        if self.runtime == "onnx":
            if self.compile or self.precision != "fp32":
                raise InputError("runtime=onnx computes its own way, in fp32: leave out --compile and --precision.")
            missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
            if missing:
                raise InputError(f"runtime=onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        if self.compile and not torch.cuda.is_available() and not has_compiler():
            raise InputError("compile needs a C++ compiler (g++) and Python.h: install both or leave it out.")
        if self.precision == "bf16" and not bf16_pays():
            print("notice: bf16 is not faster on this machine than fp32", file=sys.stderr)


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to compute (each changes the last digits)")
    group.add_argument("--fuse", action="store_true", help="fold BatchNorm into the convolution before it")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic (default: fp32)")
    group.add_argument(
        "--compile", action="store_true", dest="compiled", help="torch.compile; the first batches take a minute or so"
    )  # its own name in the namespace: `compile` is a key of recipes, about training
    group.add_argument("--runtime", choices=("torch", "onnx"), default="torch", help="onnx: export, then onnxruntime")


def inference_of(args: argparse.Namespace) -> Inference:
    """The options given on the command line, checked."""
    inference = Inference(args.fuse, args.precision, args.compiled, args.runtime)
    inference.check()
    return inference


def _conv_bn_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of a module's convolutions with the BatchNorm that follows: convN and bnN, or neighbours in sequence."""
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
    """A copy in eval mode whose BatchNorms are folded into the convolutions before them; equal up to rounding.

    InputError for a network that has no such pair.
    """
    fused, count = deepcopy(model).eval(), 0
    for module in list(fused.modules()):
        for conv, bn in _conv_bn_pairs(module):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
            setattr(module, bn, nn.Identity())
            count += 1
    if not count:
        raise InputError("fuse: this network has no BatchNorm right after a convolution; leave --fuse out.")
    return fused


def prepare(
    model: Ride,
    inference: Inference,
    routed: bool = False,
    threshold: float = 0.5,
    size: int | None = None,
    experts: Sequence[int] | None = None,
) -> Answer:
    """The model's answers, computed as asked; with default options exactly its own.

    size: side of the images, where it is not the model's own (for the export to ONNX); experts: give the logits of
    these one by one (not from ONNX, whose graph holds their mean alone).
    """
    if inference.fuse:
        model = fuse_conv_bn(model)
    if inference.runtime == "onnx":
        return _onnx_answer(model, routed, threshold, size)
    answer = (_compiled_answer if inference.compile else answer_of)(model, routed, threshold, experts)
    if inference.precision == "fp32":
        return answer
    device = next(model.parameters()).device.type

    def in_bf16(images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits, used = answer(images)
        return logits.float(), used

    return in_bf16


def _compiled_answer(model: Ride, routed: bool, threshold: float, experts: Sequence[int] | None) -> Answer:
    if not routed:
        return torch.compile(answer_of(model, experts=experts))
    model = deepcopy(model)
    model.trunk = torch.compile(model.trunk)
    for expert in model.experts:
        expert.forward = torch.compile(expert.forward, dynamic=True)  # any number of samples goes on
    return answer_of(model, routed, threshold)


def _onnx_answer(model: Ride, routed: bool, threshold: float, size: int | None) -> Answer:
    from .export import export
    from .onnx_driver import OnnxRouted, load_session

    with tempfile.TemporaryDirectory() as temporary:
        folder = export(model, Path(temporary) / "model", "driver" if routed else "none", threshold, size)
        threads = torch.get_num_threads()
        if routed:
            run = OnnxRouted(folder, threshold, threads)
        else:
            session = load_session(folder / "model.onnx", threads)

    def answer(images: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = images.float().cpu().contiguous().numpy()
        logits, used = run(pixels) if routed else (*session.run(None, {"images": pixels}), None)
        found = torch.from_numpy(logits).to(images.device)
        return found, None if used is None else torch.from_numpy(used).to(images.device)

    return answer


class Timed:
    """An answer with a stopwatch around it: forward passes only, without reading images."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[tuple[int, float]] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        started = time.perf_counter()
        found = self.answer(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        self.calls.append((len(images), time.perf_counter() - started))
        return found

    @property
    def images_per_second(self) -> float:
        """Over all calls but the first, which warms up, where there are several."""
        calls = self.calls[1:] or self.calls
        return sum(images for images, _ in calls) / sum(seconds for _, seconds in calls)
