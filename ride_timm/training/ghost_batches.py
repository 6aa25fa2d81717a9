"""Ghost batches: BatchNorm statistics per part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line


@contextmanager
def _frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm in training mode from updating its running statistics."""
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
    """Run `forward` on near-equal parts of at most `ghost_batch` images.

    With None, run it on the complete batch.
    forward: images [b, …] -> [b, …] by `model`. In training each part is normalised by its own statistics. Only those
    of the first part update the running statistics, as in nn.DataParallel, which keeps the buffers of its first GPU;
    in arXiv:1705.08741 all parts do.
    """
    if ghost_batch is None or not model.training or len(images) <= ghost_batch:
        return forward(images)
    first, *others = images.tensor_split(-(-len(images) // ghost_batch))
    outputs = [forward(first)]
    with _frozen_running_statistics(model):
        outputs += [forward(part) for part in others]
    return torch.cat(outputs)


def check_parts(model: nn.Module, size: int, num_images: Iterable[int], ghost_batch: int | None, cause: str) -> None:
    """Raise InputError if BatchNorm would see a step or ghost batch of one image.

    model: on the CPU, left unchanged; size: its smallest training image size; num_images: images per process in the
    steps; cause: what sets these numbers, for the message.
    """
    if min(n // -(-n // (ghost_batch or n)) for n in num_images) > 1:
        return
    try:
        deepcopy(model).train()(torch.zeros(1, model.in_chans, size, size))
    except ValueError as error:
        raise InputError(
            f"{cause} leave one image to a step or a ghost batch, too few for BatchNorm ({first_line(error)}): "
            "change --batch-size, or --ghost-batch if it is set."
        ) from error
