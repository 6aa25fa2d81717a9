"""Input of photographs: our loader beside timm's, same crops and colour changes, by number of workers."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from record import alternate, parse, parser, record, summary
from timm.data import create_dataset, create_loader

from ride_timm.data.augment.policies import POLICIES
from ride_timm.data.image_set import ImageSet
from ride_timm.data.load import load_longtail
from ride_timm.data.loaders.orders import RankSlices, ShuffledOrder
from ride_timm.data.loaders.workers import ViewTransform, WorkerBatches, loaded

POLICY = POLICIES["imagenet"]


def write_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write JPEGs of smooth shapes and fine noise, about 80 kB each, in four class folders; one a class for testing."""
    rng = np.random.default_rng(0)
    for i in range(-4, count):
        shapes = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 11, (size[1], size[0], 3))
        path = folder / ("test" if i < 0 else "train") / f"class_{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (np.asarray(shapes) * 0.7 + 30 + noise).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)


class Input:
    """A loader under measurement, with the CPU time and memory of its worker processes.

    batches: starts an epoch. start_up: seconds until the first batch, the start of the workers included.
    """

    def __init__(self, batches: Callable[[], Iterator[Any]]) -> None:
        self.batches = batches
        others, start = set(psutil.Process().children(recursive=True)), time.perf_counter()
        epoch = batches()
        next(epoch)
        self.start_up = time.perf_counter() - start
        self.workers = [child for child in psutil.Process().children(recursive=True) if child not in others]
        for _ in epoch:
            pass
        self.cpu_seconds: list[float] = []

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in (psutil.Process(), *self.workers))

    def run(self) -> float:
        """Wall seconds of an epoch; its CPU seconds, of this process and the workers, are kept."""
        cpu, start = self._cpu(), time.perf_counter()
        for _ in self.batches():
            pass
        seconds = time.perf_counter() - start
        self.cpu_seconds.append(self._cpu() - cpu)
        return seconds

    @property
    def worker_megabytes(self) -> float:
        """Memory that a worker shares with no other process, the largest."""
        return max(worker.memory_full_info().uss for worker in self.workers) / 1e6


def inputs(folder: Path, images: ImageSet, args: argparse.Namespace, workers: int) -> Iterator[tuple[str, Input]]:
    """Our loader and timm's on a CPU, and, as for a GPU, up to the batches that the workers give."""
    for name in ("timm", "timm, bytes"):
        theirs = create_loader(
            create_dataset("", root=folder / "train"),
            (3, args.image_size, args.image_size),
            args.batch_size,
            is_training=True,
            color_jitter=POLICY.jitter,
            interpolation="bilinear",
            mean=POLICY.mean,
            std=POLICY.std,
            num_workers=workers,
            device=torch.device("cpu"),
        )
        yield name, Input(partial(iter, theirs if name == "timm" else theirs.loader))
    for name in ("ours", "ours, bytes"):
        ours = WorkerBatches(
            images,
            ViewTransform(POLICY, True, args.image_size),
            order=ShuffledOrder(len(images), 0),
            slices=RankSlices(len(images), args.batch_size, True, 0, 1),
            seed=0,
            num_workers=workers,
        )
        yield name, Input(partial(iter, ours) if name == "ours" else partial(loaded, ours.loader))


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--data-dir", type=Path, help="photographs by class, in train/ and test/")
    flags.add_argument("--images", type=int, default=512, help="synthetic photographs of 500x375 pixels")
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--image-size", type=int, default=POLICY.size)
    flags.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    args = parse(flags, argv)

    figures, ratios = {}, []
    with tempfile.TemporaryDirectory() as made:
        folder = args.data_dir or Path(made)
        if args.data_dir is None:
            write_photos(folder, args.images)
        images = load_longtail(str(folder)).train
        for workers in args.workers:
            variants = dict(inputs(folder, images, args, workers))
            count = len(images) // args.batch_size * args.batch_size
            seconds = alternate({name: variant.run for name, variant in variants.items()}, args.rounds)
            figures[str(workers)] = row = {
                name: dict(
                    images_per_second=summary([count / value for value in seconds[name]]),
                    cpu_ms_per_image=summary([1000 * value / count for value in variant.cpu_seconds]),
                    start_up_seconds=variant.start_up,
                    worker_megabytes=variant.worker_megabytes,
                )
                for name, variant in variants.items()
            }
            print(f"{workers} workers")
            for name, found in row.items():
                rate, cpu = (found[key]["median"] for key in ("images_per_second", "cpu_ms_per_image"))
                print(
                    f"  {name:<12} {rate:6.0f} images/s, {cpu:.2f} ms of CPU each, first batch after "
                    f"{found['start_up_seconds']:.1f} s, {found['worker_megabytes']:.0f} MB a worker"
                )
            for suffix in ("", ", bytes"):
                own, other = row["ours" + suffix], row["timm" + suffix]
                rate = own["images_per_second"]["median"] / other["images_per_second"]["median"]
                cpu = other["cpu_ms_per_image"]["median"] / own["cpu_ms_per_image"]["median"]
                ratios.append(rate)
                print(f"  ours{suffix} / timm{suffix}: {rate:.2f} in images/s, {cpu:.2f} in CPU time")
            del variants
    record("photos", args, dict(by_workers=figures, ratio=min(ratios)))
    print(f"ratio {min(ratios):.2f}")


if __name__ == "__main__":
    main()
