"""CIFAR-100-LT epoch, input included: baseline, and ours in the script's loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from batches import ArrayImages, Clocked, class_counts_of, random_images
from record import alternate, parse, parser, processes, record, show, summary
from variants import VARIANTS, add_variants_flag, default_variants, ratios_of

from ride_timm.data.load import load_longtail
from ride_timm.data.loaders.in_memory import decode


def build(name: str, args: argparse.Namespace) -> Callable[[], float]:
    """Build a variant; a call runs its steps and returns seconds per step."""
    if name != "baseline":
        return build_ours(VARIANTS[name], args)
    from baseline import PlainTraining, plain_loader

    images = images_of(args)
    plain = PlainTraining("ride_resnet32", np.bincount(images.labels).tolist())
    return timed(plain.train_epoch, plain_loader(images.pixels, images.labels, args.batch_size, args.workers), args)


def build_ours(keys: dict[str, Any], args: argparse.Namespace) -> Callable[[], float]:
    """Our steps with their input, under these recipe keys."""
    from ours import Training, make_recipe

    training = Training(make_recipe("ride_resnet32", args.batch_size, 32, **keys), images_of(args), 100)
    return timed(training.train_batches, training.stage.loader, args)


def images_of(args: argparse.Namespace) -> ArrayImages:
    if not args.data_dir:
        return random_images(class_counts_of(100), 32)
    train_set = load_longtail("cifar100", args.data_dir).train
    return ArrayImages(decode(train_set).numpy(), train_set.labels)


def timed(loop: Callable[[Clocked], Any], loader: Any, args: argparse.Namespace) -> Callable[[], float]:
    """A call runs a loop on a loader's batches, warmed up, and returns its seconds per step."""

    def step() -> float:
        clocked = Clocked(loader, args.steps, args.warm_up)
        loop(clocked)
        return clocked.per_step

    return step


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--data-dir", type=Path, help="folder of CIFAR-100; random images unless given")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--steps", type=int, default=20, help="timed steps per run")
    flags.add_argument("--warm-up", type=int, default=4, help="untimed steps before, to fill the workers' queues")
    flags.add_argument(
        "--workers", type=int, default=2, help="loader workers of the baseline; 2 in the authors' config"
    )
    add_variants_flag(flags)
    args = parse(flags, argv)
    args.variants = args.variants or default_variants()
    num_images = sum(class_counts_of(100))
    steps_per_epoch = -(-num_images // args.batch_size)
    if args.warm_up + args.steps > steps_per_epoch:
        flags.error(f"--warm-up {args.warm_up} + --steps {args.steps}: an epoch has {steps_per_epoch} steps")

    builders = {name: partial(build, name, args) for name in args.variants}
    with processes(builders, args.threads) as variants:
        figures = {name: summary(values) for name, values in alternate(variants, args.rounds).items()}

    print(f"ride_resnet32 x3, {num_images} images, batch {args.batch_size}, {args.threads} threads, input included")
    show(figures, "s/step")
    epochs = {name: figure["median"] * steps_per_epoch for name, figure in figures.items()}
    for name, seconds in epochs.items():
        print(f"{name}: {seconds:.1f} s per epoch ({steps_per_epoch} steps at the median)")
    ratios = ratios_of(epochs)
    more = dict(seconds_per_epoch=epochs, steps_per_epoch=steps_per_epoch)
    record("epoch", args, dict(seconds_per_step=figures, ratios=ratios, **more))
    print(f"ratio {ratios[args.variants[-1]]:.2f}")


if __name__ == "__main__":
    main()
