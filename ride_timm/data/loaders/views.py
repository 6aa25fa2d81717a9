"""Two views of the same images in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class TwoViews:
    """Batches of two loaders that give the same images in the same order, under different augmentations.

    Yields (images [2b, 3, S, S], the first loader's and then the second's; labels [b]). Small images, augmented a batch
    at a time, are cropped and flipped anew in each view. Where both loaders work image by image, an image's crop and
    flip are the same in both, since they follow from its place in the epoch.
    """

    def __init__(self, first: Any, second: Any) -> None:
        self.loaders = (first, second)

    def __len__(self) -> int:
        return len(self.loaders[0])

    def set_epoch(self, epoch: int) -> None:
        """Epochs count from 0; the next iteration gives this one."""
        for loader in self.loaders:
            loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (first, labels), (second, _) in zip(*self.loaders, strict=True):
            yield torch.cat([first, second]), labels
