"""Routed inference: ratios of time and of MACs to those of all experts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType

import timm
import torch
from batches import wait
from record import alternate, parse, parser, record
from torch import Tensor

import ride_timm
from ride_timm.evaluation.macs import count_macs
from ride_timm.hardware import keep_memory
from ride_timm.inference.options import fuse_conv_bn

FRACTIONS = {"none": (1.0, 0.0, 0.0), "paper": (0.4099, 0.0947, 0.4954), "all": (0.0, 0.0, 1.0)}
SIZES = {"ride_resnet32": 32, "ride_resnext50": 224}
TOP_CHOICES = {"ride_resnet32": 30, "ride_resnext50": 50}


def sample_counts(batch_size: int, fractions: tuple[float, ...]) -> list[int]:
    """Samples that use 1, 2, … experts, by largest remainder."""
    exact = [batch_size * fraction for fraction in fractions]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: batch_size - sum(counts)]:
        counts[i] += 1
    return counts


def cases(batch_size: int, fractions: tuple[float, ...]) -> list[tuple[float, list[int]]]:
    """(weight, sample counts) of the batches to time.

    A single image cannot be divided: one case per number of experts, weighted by its fraction.
    """
    if batch_size > 1:
        return [(1.0, sample_counts(batch_size, fractions))]
    single = [[int(i == k) for i in range(len(fractions))] for k in range(len(fractions))]
    return [(fraction, counts) for fraction, counts in zip(fractions, single, strict=True) if fraction]


@contextmanager
def forced(router: ride_timm.Router, experts_used: Tensor):
    """Override the router's decisions by experts_used [B]; its gates still compute."""
    decisions = []
    for i in range(router.num_experts - 1):
        reached = experts_used[experts_used > i]
        decisions.append(torch.where(reached > i + 1, 10.0, -10.0))

    def gate(self: ride_timm.Router, i: int, features: Tensor, mean_logits: Tensor) -> Tensor:
        return type(self).gate(self, i, features, mean_logits).copy_(decisions[i])

    router.gate = MethodType(gate, router)
    try:
        yield
    finally:
        del router.gate


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


@torch.inference_mode()
def measure(model: ride_timm.Ride, images: Tensor, used: list[int], rounds: int, seconds: float) -> float:
    """Median time ratio of routed inference to all experts, over the rounds."""
    experts_used = torch.repeat_interleave(torch.arange(1, len(used) + 1), torch.tensor(used))
    experts_used = experts_used[torch.randperm(len(experts_used), generator=torch.Generator().manual_seed(0))]
    experts_used = experts_used.to(images.device)
    with forced(model.router, experts_used):
        assert torch.equal(model.forward_routed(images)[1], experts_used)
        model.forward_experts(images)
        once = seconds_of(lambda: model.forward_experts(images), 1)
        repeats = max(1, round(seconds / once))
        variants = {
            "routed": lambda: seconds_of(lambda: model.forward_routed(images), repeats),
            "experts": lambda: seconds_of(lambda: model.forward_experts(images), repeats),
        }
        times = alternate(variants, rounds)
    return statistics.median(r / e for r, e in zip(times["routed"], times["experts"], strict=True))


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--models", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    flags.add_argument("--batch-sizes", nargs="+", type=int, help="default: 1 32 256, for ride_resnext50 1 8 32")
    flags.add_argument("--image-size", type=int, help="default: 32, for ride_resnext50 224")
    flags.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold BatchNorm into the convolutions of both",
    )
    flags.add_argument("--seconds", type=float, default=0.5, help="minimum duration of a run; short calls are repeated")
    args = parse(flags, argv)
    keep_memory()  # as the commands do

    rows = []
    print(f"{'model':<15}{'batch':>6}  {'fractions':<9}{'time ratio':>11}{'MACs ratio':>11}{'difference':>12}")
    for name in args.models:
        size = args.image_size or SIZES[name]
        torch.manual_seed(0)
        model = timm.create_model(name, num_experts=3, router=True, top_choices_num=TOP_CHOICES[name])
        model = model.to(memory_format=torch.channels_last).eval()
        macs = count_macs(model, (3, size, size))
        model = fuse_conv_bn(model) if args.fuse else model
        for batch_size in args.batch_sizes or ((1, 32, 256) if name == "ride_resnet32" else (1, 8, 32)):
            images = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
            for label, fractions in FRACTIONS.items():
                time_ratio = macs_ratio = 0.0
                for weight, used in cases(batch_size, fractions):
                    time_ratio += weight * measure(model, images, used, args.rounds, args.seconds)
                    macs_ratio += weight * macs.expected([n / batch_size for n in used]) / macs.ensemble
                difference = 100 * (time_ratio / macs_ratio - 1)
                print(
                    f"{name:<15}{batch_size:>6}  {label:<9}{time_ratio:>11.3f}{macs_ratio:>11.3f}{difference:>10.1f} %",
                    flush=True,
                )
                row = dict(model=name, batch_size=batch_size, shares=label, time_ratio=time_ratio)
                rows.append(row | dict(macs_ratio=macs_ratio, difference_percent=difference))
    print("fractions: none uses expert 1 only; paper 40.99/9.47/49.54 % (of whole samples); all uses 3 experts")
    worst = max(abs(row["difference_percent"]) for row in rows)
    record("routed", args, dict(rows=rows, worst_deviation_percent=worst))
    print(f"worst deviation {worst:.1f} %")


if __name__ == "__main__":
    main()
