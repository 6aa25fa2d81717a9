"""Progressive resizing: smaller training images first, so that early epochs cost less. arXiv:2104.00298, section 4"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, first_line


def shrink(images: Tensor, size: int) -> Tensor:
    """Images [B, C, S, S] -> [B, C, size, size], channels last; bilinear, over the whole area that a pixel covers."""
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def check_sizes(model: Any, sizes: Sequence[int], full: int) -> None:
    """InputError for a side in pixels not below the full one, or whose images the model (on the CPU) does not take."""
    for size in sizes:
        if size >= full:
            raise InputError(f"progressive_sizes={list(sizes)}: expected sides below the input's {full} pixels.")
    training = model.training
    for size in sizes:
        try:
            model.eval()(torch.zeros(1, model.in_chans, size, size))
        except Exception as error:  # networks refuse images by whatever they like
            raise InputError(
                f"progressive_sizes={list(sizes)}: this network does not take images of {size} pixels "
                f"({first_line(error)}); choose other sides, or a network that takes images of any size."
            ) from error
    model.train(training)
