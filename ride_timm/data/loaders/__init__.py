"""Loaders: this rank's slices of an epoch, decoded, augmented and batched.

Everything random is a pure function of (seed, epoch, position in the epoch). So resuming at the start of an epoch needs
no saved sampler state, and the numbers of processes and workers do not change what is seen.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InputError
from ...hardware import usable_cores
from ..augment.images import decode_full
from ..augment.policies import Policy, get_policy
from ..augment.reduced_decode import decode_reduced
from ..image_set import BatchSource, ImageSet
from .in_memory import TensorBatches, decode
from .orders import SAMPLERS, Batches, Order, RankSlices, SampledOrder, SequentialOrder, ShuffledOrder, check_integer
from .workers import FiveCrops, ViewTransform, WorkerBatches


def make_loader(
    image_set: ImageSet | BatchSource,
    policy: str | Policy,
    *,
    train: bool,
    batch_size: int,
    seed: int,
    sampler: str = "instance",
    epochs: int = 1,
    views: int = 1,
    five_crops: bool = False,
    rank: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    input_size: int | None = None,
    reduced_decode: bool = False,
) -> Batches:
    """The loader of an image set: in memory for small images, else by workers.

    A set that cannot give single images makes its own batches, see `BatchSource`.

    train: shuffle and augment; otherwise every image once, in order, with the test transform.
    batch_size: over all processes.
    sampler: one of `SAMPLERS`; "instance" is every image once. Others are for training only, see
        `orders.class_probabilities`; epochs: those of the stage, over which "progressive" changes.
    views: 2 for two views of each image in a batch, the first without the policy's `auto_augment`.
    five_crops: five views of each image (evaluation only), see `workers.FiveCrops`.
    num_workers: processes that load images; no more than the CPU has cores.
    input_size: default the policy's. Small images of another size are resized once, when they are decoded.
    reduced_decode: decode large JPEGs at reduced size. Crops are the same, pixels nearly so.

    Raises `InputError` for arguments out of range, before an image is read.
    """
    policy = get_policy(policy)
    size = policy.input_size(input_size)
    num_workers = min(check_integer(num_workers, "number of workers", 0), usable_cores())
    if len(image_set) == 0:
        raise InputError(f"split {image_set.split!r} has zero images")
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if sampler != "instance" and not train:
        raise InputError(f"sampler={sampler}: a sampler is for training")
    slices = RankSlices(len(image_set), batch_size, train, rank, num_processes)
    decoder = decode_reduced if reduced_decode else decode_full
    transform = FiveCrops(policy, size, decoder) if five_crops else ViewTransform(policy, train, size, decoder, views)
    if isinstance(image_set, BatchSource):
        how: dict[str, Any] = dict(slices=slices, seed=seed, num_workers=num_workers, device=device)
        return image_set.batches(policy, transform, sampler=sampler, **how)
    order: Order = SequentialOrder(len(image_set))
    if train:
        order = ShuffledOrder(len(image_set), seed)
        if sampler != "instance":
            order = SampledOrder(image_set.labels, seed, sampler, epochs)
    how = dict(order=order, slices=slices, seed=seed, device=device)
    if policy.in_memory:
        if torch.device(device).type == "cpu":
            num_workers = 0  # training takes all cores
        pixels = decode(image_set, size)
        return TensorBatches(pixels, image_set.labels, policy, views=views, num_workers=num_workers, **how)
    return WorkerBatches(image_set, transform, num_workers=num_workers, **how)
