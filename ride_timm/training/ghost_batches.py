"""Ghost batches: BatchNorm statistics of parts of a batch, as a network replicated over several GPUs sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm in training normalises as ever and leaves its running statistics alone."""
    tracking = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def forward_in_parts(
    forward: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, ghost_batch: int | None
) -> Tensor:
    """forward(images) part by part, the parts as equal as can be and of at most `ghost_batch` images.

    forward: images [b, …] -> [b, …] by `model`; in training each part is normalised by its own statistics, and the
    first one's alone enter the running statistics, which is what nn.DataParallel makes of a batch: it keeps the
    buffers of its first GPU. None: the whole batch at once. arXiv:1705.08741 (whose running statistics know all parts)
    """
    if ghost_batch is None or not model.training or len(images) <= ghost_batch:
        return forward(images)
    first, *others = images.tensor_split(-(-len(images) // ghost_batch))
    outputs = [forward(first)]
    with _running_statistics_kept(model):
        outputs += [forward(part) for part in others]
    return torch.cat(outputs)


def check_parts(model: nn.Module, side: int, shares: Iterable[int], ghost_batch: int | None, batches: str) -> None:
    """InputError where a step or a ghost batch of one image leaves BatchNorm nothing to take statistics from.

    model: on the CPU, left as it is; side: the smallest of its training images, in pixels; shares: numbers of images
    that a process takes in a step; batches: what makes them so, for the error.
    """
    if min(images // -(-images // (ghost_batch or images)) for images in shares) > 1:
        return
    try:
        deepcopy(model).train()(torch.zeros(1, model.in_chans, side, side))
    except ValueError as error:
        raise InputError(
            f"{batches} leave one image to a step or a ghost batch, which BatchNorm cannot learn from "
            f"({first_line(error)}): choose another --batch-size, or --ghost-batch where it is set."
        ) from error
