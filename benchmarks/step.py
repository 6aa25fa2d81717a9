"""Training step (forward, loss, backward, optimizer) on images in memory: baseline, ours in fp32, ours in bf16."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from baseline import PlainTraining
from batches import Clocked, class_counts_of, random_batch
from ours import Training, make_recipe
from record import alternate, parse, parser, record, show, summary


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", choices=("ride_resnet32", "ride_resnext50"), default="ride_resnet32")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--num-experts", type=int, default=3)
    flags.add_argument("--steps", type=int, default=4, help="timed steps of each run")
    flags.add_argument("--warm-up", type=int, default=1, help="steps before them")
    flags.add_argument("--compile", action="store_true", help="also ours in bf16 through torch.compile")
    args = parse(flags, argv)

    num_classes = 100 if args.model == "ride_resnet32" else 1000
    class_counts = class_counts_of(num_classes)
    image_set = SimpleNamespace(labels=np.repeat(np.arange(num_classes), class_counts))
    images, targets = random_batch(args.batch_size, num_classes, args.image_size)
    channels_last = images.contiguous(memory_format=torch.channels_last)

    def run(train, images: torch.Tensor) -> float:
        clocked = Clocked([(images, targets)] * (args.warm_up + args.steps), args.steps, args.warm_up)
        train(clocked)
        return clocked.per_step

    def ours(precision: str, compiled: bool = False) -> partial:
        recipe = make_recipe(args.model, args.batch_size, args.image_size, precision, args.num_experts, compiled)
        training = Training(recipe, image_set, num_classes)
        return partial(run, training.train_batches, channels_last)

    plain = PlainTraining(args.model, class_counts, args.num_experts)
    variants = {"baseline": partial(run, plain.train_epoch, images), "ours fp32": ours("no"), "ours bf16": ours("bf16")}
    if args.compile:
        variants["ours bf16 compiled"] = ours("bf16", compiled=True)
    for variant in variants.values():
        variant()  # allocations, kernel choices, compilation
    figures = {name: summary(values) for name, values in alternate(variants, args.rounds).items()}

    print(f"{args.model} x{args.num_experts}, batch {args.batch_size}, {args.image_size} px, {args.threads} threads")
    show(figures, "s/step")
    baseline = figures["baseline"]["median"]
    ratios = {name: baseline / figure["median"] for name, figure in figures.items() if name != "baseline"}
    for name, ratio in ratios.items():
        print(f"baseline / {name}: {ratio:.2f}")
    record("step", args, dict(seconds_per_step=figures, ratios=ratios))
    print(f"ratio {ratios['ours bf16']:.2f}")


if __name__ == "__main__":
    main()
