"""Estimate communication, input rate and memory of training on many GPUs.

Nothing is run: parameters, MACs and BatchNorm layers are counted, and every assumption has a flag.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout is counted

import ride_timm  # noqa: F401  (registers the networks)
from ride_timm.evaluation.macs import count_macs
from ride_timm.evaluation.tables import millions

FP32 = 4  # bytes of a parameter, its gradient or its momentum, also under bf16 autocast
IMAGENET_JPEG = 108e3  # bytes: 138 GB of training images over 1.28 million
CIFAR_ARRAY = 32 * 32 * 3  # bytes, decoded


@dataclass(frozen=True)
class Setting:
    """Network, classes, batch and images of a recipe; image_bytes: encoded size."""

    model: str
    num_experts: int
    num_classes: int
    batch_size: int
    image_size: int
    image_bytes: float

    @property
    def name(self) -> str:
        return f"`{self.model}` x{self.num_experts}, {self.num_classes} classes, batch {self.batch_size}"


SETTINGS = (
    Setting("ride_resnet32", 3, 100, 128, 32, CIFAR_ARRAY),
    Setting("ride_resnext50", 3, 1000, 256, 224, IMAGENET_JPEG),
    Setting("ride_resnet50", 3, 8142, 512, 224, IMAGENET_JPEG),
    Setting("ride_resnet152", 6, 1000, 256, 224, IMAGENET_JPEG),
    Setting("ride_swin_small", 3, 1000, 1024, 224, IMAGENET_JPEG),
)


@dataclass(frozen=True)
class Counts:
    """Parameters, MACs per image, and the channels of each BatchNorm layer."""

    params: int
    macs: float
    norm_channels: tuple[int, ...]


def count(setting: Setting) -> Counts:
    """Count on the meta device, without allocating weights."""
    with torch.device("meta"):
        model = timm.create_model(setting.model, num_experts=setting.num_experts, num_classes=setting.num_classes)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return Counts(
        sum(parameter.numel() for parameter in model.parameters()),
        count_macs(model, (3, setting.image_size, setting.image_size)).ensemble,
        tuple(norm.num_features for norm in norms),
    )


def all_reduce(num_bytes: float, processes: int) -> float:
    """Bytes sent per process in a ring all-reduce: reduce-scatter, then all-gather."""
    return 2 * (processes - 1) / processes * num_bytes


def sync_bn(norm_channels: tuple[int, ...], processes: int) -> float:
    """Bytes sent per process and step by SyncBatchNorm.

    Forward, each layer gathers mean, inverse standard deviation and count; backward, it reduces two sums.
    """
    forward = sum((2 * channels + 1) * FP32 * (processes - 1) for channels in norm_channels)
    return forward + all_reduce(2 * FP32 * sum(norm_channels), processes)


def size(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def rows(settings: tuple[Setting, ...], args: argparse.Namespace) -> tuple[list[list[str]], list[float]]:
    """Table rows, and the fraction of a step spent on gradients in each setting."""
    processes = args.nodes * args.gpus_per_node
    bytes_per_second = (args.link if args.nodes > 1 else args.link_within) * 1e9 / 8
    table, fractions = [], []
    for setting in settings:
        counts = count(setting)
        gradients = counts.params * FP32
        sent = all_reduce(gradients, processes)
        exchange = sent / bytes_per_second
        # forward and backward: three times the forward MACs, two operations each
        compute = 6 * counts.macs * setting.batch_size / processes / (args.tflops * 1e12)
        images = setting.batch_size / (exchange + compute)
        fractions.append(exchange / (exchange + compute))
        norms = counts.norm_channels
        waits = 2 * len(norms) * args.wait * 1e-6
        table.append(
            [
                setting.name,
                f"{millions(counts.params)} M",
                size(gradients),
                size(sent),
                f"{1e3 * exchange:.1f} ms",
                f"{1e3 * compute:.1f} ms",
                f"{images:.0f}",
                f"{size(images * setting.image_bytes)}/s",
                size(3 * gradients),  # parameters, gradients, momentum
                f"{size(sync_bn(norms, processes))}, {1e3 * waits:.1f} ms" if norms else "–",
            ]
        )
    return table, fractions


HEADER = ("network", "parameters", "gradients", "a GPU sends", "communication", "computation",
          "images/s", "input", "a GPU holds", "SyncBN sends, waits")  # fmt: skip


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def estimate(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--nodes", type=int, choices=range(1, 1025), metavar="N", default=2)
    flags.add_argument("--gpus-per-node", type=int, choices=range(1, 65), metavar="N", default=8)
    flags.add_argument("--link", type=positive, default=100, help="Gb/s between nodes")
    flags.add_argument("--link-within", type=positive, default=200, help="Gb/s between the GPUs of one node")
    flags.add_argument("--tflops", type=positive, default=40, help="sustained TFLOP/s of a GPU")
    flags.add_argument("--wait", type=positive, default=50, help="latency of a small message in microseconds")
    args = flags.parse_args(argv)
    table, fractions = rows(SETTINGS, args)
    print(f"{args.nodes} x {args.gpus_per_node} GPUs: an estimate, not a measurement\n")
    for cells in (HEADER, ["---"] * len(HEADER), *table):
        print("| " + " | ".join(cells) + " |")
    largest = max(range(len(fractions)), key=fractions.__getitem__)
    percent = f"{100 * fractions[largest]:.0f} % ({SETTINGS[largest].model})"
    print(f"\nlargest fraction of a step spent on gradients {percent}")


if __name__ == "__main__":
    estimate()
