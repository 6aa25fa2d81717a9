"""Training batches that do not fit a device: one line that names a batch that does."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import RunError
from ..hardware import device_name
from .recipe import stage_flag
from .stages import Stage


@contextmanager
def enough_memory(stage: Stage) -> Iterator[None]:
    """Turn torch's OutOfMemoryError into a RunError with the largest half, quarter, … of the batch that fits.

    With several processes none is tried: the others would wait in its collectives.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        message = _describe(stage)
    else:
        return
    raise RunError(message)


def _describe(stage: Stage) -> str:
    accelerator, accumulation = stage.accelerator, stage.recipe.gradient_accumulation
    flag = stage_flag(stage.name, "batch_size")
    size = stage.settings.batch_size // accelerator.num_processes
    what = f"out of memory: {flag} {stage.settings.batch_size}, {size} images on {device_name(accelerator.device)}"
    what += _others(accelerator.device)
    halves = [2**k for k in range(1, size.bit_length())] if accelerator.num_processes == 1 else []
    fits = next((part for part in halves if _fits(stage, size // part)), None)
    if fits is None:
        return f"{what}: pass a smaller {flag}, with --gradient-accumulation for nearly the same updates."
    fit = f"{what}: {size // fits} fit; pass {flag} {size // fits}"
    if stage.routed:  # the accumulation is also a key of the experts, which are trained
        return f"{fit} --stage router."
    return f"{fit} --gradient-accumulation {fits * accumulation}."


def _fits(stage: Stage, num_images: int) -> bool:
    """Try a training step on black images; the run ends with it, so that its weights do not matter."""
    device, size = stage.accelerator.device, stage.data.size
    views = getattr(stage, "num_views", 1)
    stage.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        images = torch.zeros(views * num_images, stage.model.in_chans, size, size, device=device)
        targets = torch.zeros(num_images, dtype=torch.int64, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        stage.accelerator.backward(stage.wrapped(images, targets)["loss"])
        stage.optimizer.step()
    except (torch.OutOfMemoryError, ValueError):  # ValueError: one image is too few for BatchNorm
        return False
    return True


def _others(device: torch.device) -> str:
    """The memory of a GPU that other processes hold, if it is more than a CUDA context."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return f", of which other processes hold {others / 2**30:.1f} of {total / 2**30:.1f} GiB" if others > 2**31 else ""
