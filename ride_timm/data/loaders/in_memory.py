"""Batches of small images, held decoded in memory and augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ...errors import InputError
from ..augment.auto_augment import AutoAugment
from ..augment.batches import BatchAugment
from ..augment.images import Fit
from ..augment.policies import Policy, get_policy
from ..image_set import ImageSet
from .orders import BATCH, STRONG, Batches, Order, RankSlices, Slice, torch_seed


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
    global batch and then sliced, so they do not depend on the number of processes. A policy with `auto_augment` has
    draws of its own, and its pixels are held on the CPU, where Pillow augments image by image. Of two views, the first
    is that of the weak policy.

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
        self.auto_augment = None
        if slices.train and policy.auto_augment is not None:
            self.auto_augment = AutoAugment(policy.auto_augment, size, policy.mean)
        self.streams = (BATCH, STRONG) if views == 2 else (BATCH if policy == policy.weak else STRONG,)
        self.pixels = pixels.cpu() if self.auto_augment else pixels.to(self.device)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.augments = {BATCH: BatchAugment(policy.weak, size, self.device)}
        self.augments[STRONG] = BatchAugment(policy, size, self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = torch.from_numpy(self.order(epoch))
        labels = self.labels.index_select(0, order.to(self.device))
        order = order.to(self.pixels.device)
        for part in self.slices:
            images = self.pixels.index_select(0, order[part.low : part.high])
            if self.slices.train:
                views = [self._view(images, stream, epoch, part) for stream in self.streams]
                images = views[0] if len(views) == 1 else torch.cat(views)
            else:
                images = self.augments[BATCH].normalize(images)
            yield images, labels[part.low : part.high]

    def _view(self, images: Tensor, stream: int, epoch: int, part: Slice) -> Tensor:
        """Augment a slice, uint8 [b, S, S, 3], with the draws of a stream."""
        generator = torch.Generator().manual_seed(torch_seed(self.seed, stream, epoch, part.step))
        num_images, low, high = part.stop - part.start, part.low - part.start, part.high - part.start
        augment = self.augments[stream]
        draws = augment.draw(num_images, generator).part(low, high)
        if stream == STRONG and self.auto_augment:
            seeds = torch.randint(2**32, (num_images,), generator=generator)[low:high]
            images = self.auto_augment.batch(images, seeds)
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # a copy from pageable memory would block until the GPU is idle
        return augment(images.to(self.device, non_blocking=True), draws)
