"""Random images, and a timed loader."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def exponential_counts(num_classes: int, largest: int, smallest: int) -> list[int]:
    """Exponential class counts; 500 to 5 over 100 classes is CIFAR-100-LT."""
    decay = (smallest / largest) ** (1 / max(num_classes - 1, 1))
    return [int(largest * decay**c + 1e-9) for c in range(num_classes)]


def class_counts_of(num_classes: int) -> list[int]:
    """CIFAR-100-LT's counts for 100 classes, else the range of ImageNet-LT's."""
    return exponential_counts(num_classes, *((500, 5) if num_classes == 100 else (1280, 5)))


class ArrayImages:
    """Decoded images with the interface of ride_timm's `ImageSet`."""

    split = "train"

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels, self.rows = pixels, labels, np.arange(len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.labels[i])

    def read(self, i: int, load: Callable[[Image.Image], Image.Image]) -> tuple[Image.Image, int]:
        image, label = self[i]
        return load(image), label


def random_images(class_counts: list[int], size: int) -> ArrayImages:
    """Random images, `class_counts[c]` of class c."""
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    return ArrayImages(pixels, labels)


class Photographs(ArrayImages):
    """JPEGs in memory; the same few stand for all images."""

    def __init__(self, files: list[bytes], num_images: int) -> None:
        super().__init__(np.empty((num_images, 0)), np.zeros(num_images, dtype=np.int64))
        self.files = files

    def read(self, i: int, load: Callable[[Image.Image], Image.Image]) -> tuple[Image.Image, int]:
        with Image.open(io.BytesIO(self.files[i % len(self.files)])) as image:
            return load(image), 0


def random_photographs(num_images: int, width: int = 500, height: int = 375) -> Photographs:
    """JPEGs of random, smooth pixels."""
    generator, files = np.random.default_rng(0), []
    for _ in range(16):
        coarse = Image.fromarray(generator.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return Photographs(files, num_images)


def labels_only(class_counts: list[int]) -> ArrayImages:
    """Image set without pixels, for loops that never read an image."""
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    return ArrayImages(np.empty((len(labels), 0)), labels)


def random_batch(batch_size: int, num_classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Images float32 [B, 3, S, S] in the default memory layout, and targets [B]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator)
    return images, torch.randint(num_classes, (batch_size,), generator=generator)


def wait() -> None:
    """Wait for the GPU, if there is one: its work is queued, so that a clock read too early shows nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Clocked:
    """Time `steps` batches of a loader, after `warm_up` untimed ones.

    `seconds` runs from the request for the first timed batch to the end of the last step's body, on a GPU included.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], steps: int, warm_up: int = 0) -> None:
        self.batches, self.steps, self.warm_up = batches, steps, warm_up
        self.seconds = float("nan")

    def __len__(self) -> int:
        return self.warm_up + self.steps

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        started, iterator = time.perf_counter(), iter(self.batches)
        for step in range(len(self)):
            if step == self.warm_up and step:
                wait()
                started = time.perf_counter()
            yield next(iterator)
        wait()
        self.seconds = time.perf_counter() - started

    @property
    def per_step(self) -> float:
        return self.seconds / self.steps
