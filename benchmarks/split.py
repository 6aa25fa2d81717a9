"""Long-tailed selection from labels alone: as many as CIFAR-100, ImageNet-LT and iNaturalist 2018 have."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from record import alternate, parse, parser, record, show, summary

from ride_timm.data.longtail import longtail_indices

SIZES = {"CIFAR-100": (50_000, 100), "ImageNet-LT": (115_846, 1000), "iNaturalist 2018": (437_513, 8142)}


def seconds_to_select(labels: np.ndarray) -> float:
    started = time.perf_counter()
    longtail_indices(labels, "exp", 0.1)
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> None:
    args = parse(parser(__doc__), argv)
    rng = np.random.default_rng(0)
    variants = {}
    for name, (num_images, num_classes) in SIZES.items():
        labels = rng.permutation(np.arange(num_images) % num_classes)
        variants[f"{name}, {num_images:,} labels"] = partial(seconds_to_select, labels)
    figures = {name: summary(values) for name, values in alternate(variants, args.rounds).items()}
    show(figures)
    slowest = max(figure["median"] for figure in figures.values())
    record("split", args, dict(seconds=figures))
    print(f"slowest {slowest:.3f} s")


if __name__ == "__main__":
    main()
