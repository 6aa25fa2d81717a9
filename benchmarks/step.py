"""Training step on images in memory: baseline, and ours in fp32 and bf16."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from batches import Clocked, class_counts_of, labels_only, random_batch, random_images
from record import alternate, parse, parser, processes, record, show, summary
from torch import Tensor
from variants import VARIANTS, add_variants_flag, default_variants, ratios_of


def build(name: str, args: argparse.Namespace) -> Callable[[], float]:
    """Build a variant; a call runs its steps and returns seconds per step."""
    if name != "baseline":
        return build_ours(VARIANTS[name], args)
    from baseline import PlainTraining

    num_classes = classes_of(args.model)
    loop = PlainTraining(args.model, class_counts_of(num_classes), args.num_experts).train_epoch
    return timed(loop, random_batch(args.batch_size, num_classes, args.image_size), args)


def build_ours(keys: dict[str, Any], args: argparse.Namespace) -> Callable[[], float]:
    """Our training step under these recipe keys, on the device that Accelerate chooses."""
    from ours import Training, make_recipe

    num_classes = classes_of(args.model)
    class_counts = class_counts_of(num_classes)
    recipe = make_recipe(args.model, args.batch_size, args.image_size, args.num_experts, **keys)
    image_set = random_images(class_counts, args.image_size) if args.image_size <= 64 else labels_only(class_counts)
    training = Training(recipe, image_set, num_classes)
    images, targets = random_batch(args.batch_size, num_classes, args.image_size)
    device = training.stage.accelerator.device
    batch = images.to(device, memory_format=torch.channels_last), targets.to(device)
    return timed(training.train_batches, batch, args)


def classes_of(model: str) -> int:
    return 100 if model == "ride_resnet32" else 1000


def timed(
    loop: Callable[[Clocked], Any], batch: tuple[Tensor, Tensor], args: argparse.Namespace
) -> Callable[[], float]:
    """A call runs a loop on this batch, warmed up, and returns its seconds per step."""

    def run() -> float:
        clocked = Clocked([batch] * (args.warm_up + args.steps), args.steps, args.warm_up)
        loop(clocked)
        return clocked.per_step

    return run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", choices=("ride_resnet32", "ride_resnext50"), default="ride_resnet32")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--num-experts", type=int, default=3)
    flags.add_argument("--steps", type=int, default=4, help="timed steps per run")
    flags.add_argument("--warm-up", type=int, default=1, help="untimed steps before")
    add_variants_flag(flags)
    args = parse(flags, argv)
    args.variants = args.variants or default_variants()

    builders = {name: partial(build, name, args) for name in args.variants}
    with processes(builders, args.threads) as variants:
        figures = {name: summary(values) for name, values in alternate(variants, args.rounds).items()}

    print(f"{args.model} x{args.num_experts}, batch {args.batch_size}, {args.image_size} px, {args.threads} threads")
    show(figures, "s/step")
    ratios = ratios_of({name: figure["median"] for name, figure in figures.items()})
    record("step", args, dict(seconds_per_step=figures, ratios=ratios))
    print(f"ratio {ratios[args.variants[-1]]:.2f}")


if __name__ == "__main__":
    main()
