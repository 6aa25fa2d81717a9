"""CIFAR input alone: PIL images one at a time, and ours augmented in batches, also with AutoAugment and Cutout."""

from __future__ import annotations

from functools import partial

import torch
from baseline import plain_loader
from batches import Clocked, class_counts_of, random_batch, random_images
from ours import Training, make_recipe
from record import alternate, parse, parser, record, show, summary


def drain(clocked: Clocked) -> None:
    for _ in clocked:
        pass


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--steps", type=int, default=20, help="timed batches per run")
    flags.add_argument("--warm-up", type=int, default=4, help="untimed batches before, to fill the queues")
    flags.add_argument("--train-steps", type=int, default=3, help="timed training steps per run")
    args = parse(flags, argv)

    images = random_images(class_counts_of(100), 32)
    full_batches = len(images) // args.batch_size
    if args.warm_up + args.steps > full_batches:
        flags.error(f"--warm-up {args.warm_up} + --steps {args.steps}: an epoch has {full_batches} full batches")
    recipe = make_recipe("ride_resnet32", args.batch_size, 32, mixed_precision="bf16")
    training = Training(recipe, images, 100)
    strong = Training(recipe.override(dict(auto_augment="cifar10", cutout=16)), images, 100)
    batch, targets = random_batch(args.batch_size, 100, 32)
    held = [(batch.contiguous(memory_format=torch.channels_last), targets)] * (1 + args.train_steps)

    def run(consume, batches, steps: int, warm_up: int) -> float:
        clocked = Clocked(batches, steps, warm_up)
        consume(clocked)
        return clocked.per_step

    loaders = {
        "baseline, 2 workers": plain_loader(images.pixels, images.labels, args.batch_size, 2),
        "baseline, in-process": plain_loader(images.pixels, images.labels, args.batch_size, 0),
        "ours": training.stage.loader,
        "ours, AutoAugment and Cutout": strong.stage.loader,
    }
    variants = {name: partial(run, drain, loader, args.steps, args.warm_up) for name, loader in loaders.items()}
    variants["our training step (bf16)"] = partial(run, training.train_batches, held, args.train_steps, 1)
    figures = {
        name: summary([1000 * value for value in values]) for name, values in alternate(variants, args.rounds).items()
    }

    print(f"batch {args.batch_size} of 32 px, {args.threads} threads")
    show(figures, "ms/step", 2)
    own, step = figures["ours"]["median"], figures["our training step (bf16)"]["median"]
    strongest = figures["ours, AutoAugment and Cutout"]["median"]
    percent, percent_strong = (100 * value / (value + step) for value in (own, strongest))
    print(f"input: {percent:.1f} % of our step, with AutoAugment and Cutout {percent_strong:.1f} %")
    in_process = figures["baseline, in-process"]["median"] / own
    print(f"baseline in-process / ours: {in_process:.2f}")
    ratio = figures["baseline, 2 workers"]["median"] / own
    fractions = dict(share_percent=percent, share_percent_strong=percent_strong)
    record("input", args, dict(ms_per_step=figures, **fractions, ratio=ratio, ratio_in_process=in_process))
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
