"""Progressive resizing: smaller training images first, so that early epochs cost less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


def shrink(images: Tensor, size: int) -> Tensor:
    """Images [B, C, S, S] -> [B, C, size, size], bilinear over the whole area each pixel covers, channels last."""
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


def check_sizes(model: Any, sizes: Sequence[int], full: int) -> None:
    """InputError for a side not below the full one, or whose images the model cannot read."""
    for size in sizes:
        if size >= full:
            raise InputError(f"progressive_sizes={list(sizes)}: expected sides below the input's {full} pixels.")
        training, device = model.training, next(model.parameters()).device
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, model.in_chans, size, size, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"progressive_sizes={list(sizes)}: this network cannot read images of {size} pixels "
                f"({str(error).splitlines()[0]}); leave the side out or choose a network without a fixed input size."
            ) from error
        finally:
            model.train(training)
