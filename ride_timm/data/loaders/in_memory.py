"""Batches of small images, held decoded in memory and augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import InputError
from ...hardware import send
from ..augment.auto_augment import AutoAugment
from ..augment.batches import BatchAugment, Draws
from ..augment.images import Fit
from ..augment.policies import Policy, get_policy
from ..image_set import ImageSet
from .orders import BATCH, STRONG, Batches, EpochKeys, Order, RankSlices, Slice, torch_seed
from .workers import ignore_interrupts


def decode(image_set: ImageSet, size: int | None = None) -> Tensor:
    """Decode a set: uint8 [N, H, W, 3], or [N, size, size, 3] if a size is given.

    Raises `RunError`, naming the row, for an image that cannot be read; `InputError` if image sizes differ and no size
    is given.
    """
    resize = Fit(size) if size else None
    pixels = None
    for i in range(len(image_set)):
        image = image_set[i][0]
        array = np.asarray(resize(image) if resize else image)
        if pixels is None:
            pixels = np.empty((len(image_set), *array.shape), dtype=np.uint8)
        if array.shape != pixels.shape[1:]:
            (h, w), (first_h, first_w) = array.shape[:2], pixels.shape[1:3]
            raise InputError(
                f"the image in row {image_set.rows[i]} of split {image_set.split!r} is {w}x{h} pixels, the first one "
                f"{first_w}x{first_h}; give a size to fit them to"
            )
        pixels[i] = array
    if pixels is None:
        raise InputError(f"split {image_set.split!r} has zero images")
    return torch.from_numpy(pixels)


class TensorBatches(Batches):
    """Batches of small images from a tensor on `device`.

    Yields (images float32 [V*b, 3, S, S] channels last, labels int64 [b]) on `device`. Random choices are drawn for the
    global batch and then sliced, so they do not depend on the number of processes. All happens on the device, but for
    policies of `auto_augment` other than CIFAR-10's: these have draws of their own, and Pillow augments image by image
    on the CPU, by worker processes if there are any. Of two views, the first is that of the weak policy.

    pixels: uint8 [N, S, S, 3]; labels: [N].
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: ArrayLike,
        policy: str | Policy,
        *,
        order: Order,
        slices: RankSlices,
        seed: int,
        device: str | torch.device = "cpu",
        views: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(slices, seed, device)
        labels = np.asarray(labels, dtype=np.int64)
        square = pixels.ndim == 4 and pixels.shape[1] == pixels.shape[2] and pixels.shape[3] == 3
        if pixels.dtype != torch.uint8 or not square:
            raise InputError(f"pixels must be uint8 [N, S, S, 3], not {pixels.dtype} {list(pixels.shape)}")
        if len(labels) != len(pixels):
            raise InputError(f"{len(pixels)} images have {len(labels)} labels")
        policy, size = get_policy(policy), pixels.shape[1]
        self.order = order
        self.streams = (BATCH, STRONG) if views == 2 else (BATCH if policy == policy.weak else STRONG,)
        self.pixels, self.labels = pixels.to(self.device), torch.from_numpy(labels).to(self.device)
        self.augments = {BATCH: BatchAugment(policy.weak, size, self.device)}
        self.augments[STRONG] = BatchAugment(policy, size, self.device)
        self.loader = None
        if slices.train and policy.auto_augment is not None and self.augments[STRONG].auto_augment is None:
            self.keys = EpochKeys(order, slices)
            self.loader = DataLoader(
                _AutoAugmented(pixels.cpu(), policy, self.seed),
                sampler=self.keys,
                batch_size=None,
                num_workers=num_workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=num_workers > 0,
                worker_init_fn=ignore_interrupts,
                generator=torch.Generator(),  # its own: DataLoader always draws a base seed
            )

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.loader is not None:
            self.keys.epoch = self.epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = send(torch.from_numpy(self.order(epoch)), self.device)
        labels = self.labels.index_select(0, order)
        strong = iter(()) if self.loader is None else iter(self.loader)
        for part in self.slices:
            images = self.pixels.index_select(0, order[part.low : part.high])
            if self.slices.train:
                views = [self._view(images, stream, epoch, part, strong) for stream in self.streams]
                images = views[0] if len(views) == 1 else torch.cat(views)
            else:
                images = self.augments[BATCH].normalize(images)
            yield images, labels[part.low : part.high]

    def _view(self, images: Tensor, stream: int, epoch: int, part: Slice, strong: Iterator[Tensor]) -> Tensor:
        """Augment a slice, uint8 [b, S, S, 3], with the draws of a stream; strong: the slices after AutoAugment."""
        augment = self.augments[stream]
        draws, _ = _draw(augment, self.seed, stream, epoch, part)
        if stream == STRONG and self.loader is not None:
            images = send(next(strong), self.device)
        return augment(images, draws)


def _draw(augment: BatchAugment, seed: int, stream: int, epoch: int, part: Slice) -> tuple[Draws, torch.Generator]:
    """The random draws of a slice, and the generator after those of its global batch."""
    generator = torch.Generator().manual_seed(torch_seed(seed, stream, epoch, part.step))
    draws = augment.draw(part.stop - part.start, generator)
    return draws.part(part.low - part.start, part.high - part.start), generator


class _AutoAugmented:
    """Slices of an epoch after AutoAugment, on the CPU: (epoch, slice, rows [b]) -> uint8 [b, S, S, 3]."""

    def __init__(self, pixels: Tensor, policy: Policy, seed: int) -> None:
        self.pixels, self.seed, size = pixels, seed, pixels.shape[1]
        self.augment = BatchAugment(policy, size)
        self.auto_augment = AutoAugment(str(policy.auto_augment), size, policy.mean)

    def __getitem__(self, key: tuple[int, Slice, np.ndarray]) -> Tensor:
        epoch, part, rows = key
        _, generator = _draw(self.augment, self.seed, STRONG, epoch, part)
        seeds = torch.randint(2**32, (part.stop - part.start,), generator=generator)
        seeds = seeds[part.low - part.start : part.high - part.start]
        return self.auto_augment.batch(self.pixels[torch.from_numpy(rows)], seeds)
