"""Peak resident memory of training steps: baseline and ours, each in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from batches import Clocked, class_counts_of, labels_only, random_batch, random_images
from record import alternate, parse, parser, record, show, summary
from variants import VARIANTS, add_variants_flag, default_variants


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def train(side: str, model: str, batch_size: int, size: int, steps: int) -> None:
    """A few steps in this process; prints its peak memory before the network is built and at the end."""
    num_classes = 100 if model == "ride_resnet32" else 1000
    class_counts = class_counts_of(num_classes)
    images, targets = random_batch(batch_size, num_classes, size)
    if side == "baseline":
        from baseline import PlainTraining

        imported = peak_megabytes()
        loop = PlainTraining(model, class_counts).train_epoch
    else:
        from ours import Training, make_recipe

        imported = peak_megabytes()
        recipe = make_recipe(model, batch_size, size, **VARIANTS[side])
        image_set = random_images(class_counts, size) if size <= 64 else labels_only(class_counts)
        loop = Training(recipe, image_set, num_classes).train_batches
        images = images.contiguous(memory_format=torch.channels_last)
    loop(Clocked([(images, targets)] * steps, steps))
    print(json.dumps(dict(imported=imported, peak=peak_megabytes())))


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--model", choices=("ride_resnet32", "ride_resnext50"), default="ride_resnet32")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--steps", type=int, default=3)
    flags.add_argument("--side", choices=tuple(VARIANTS), help="only this one, in this process")
    add_variants_flag(flags)
    args = parse(flags, argv)
    if args.side:
        return train(args.side, args.model, args.batch_size, args.image_size, args.steps)
    args.variants = args.variants or default_variants()

    above: dict[str, list[float]] = {side: [] for side in args.variants}

    def run(side: str) -> float:
        command = [sys.executable, str(Path(__file__).resolve()), "--side", side]
        for name in ("model", "batch_size", "image_size", "steps", "threads"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(ran.stdout.splitlines()[-1])
        above[side].append(figures["peak"] - figures["imported"])
        return figures["peak"]

    whole = alternate({side: partial(run, side) for side in args.variants}, args.rounds)
    figures = {name: summary(values) for name, values in whole.items()}
    figures_above = {name: summary(values) for name, values in above.items()}
    print(f"{args.model} x3, batch {args.batch_size}, {args.image_size} px: peak of the process")
    show(figures, "MiB", 0)
    print("of this, beyond what the imports take")
    show(figures_above, "MiB", 0)
    ratio = figures["baseline"]["median"] / figures[args.variants[-1]]["median"]
    record("memory", args, dict(peak_mib=figures, peak_mib_beyond_imports=figures_above, ratio=ratio))
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
