"""Batches: a process' share of an epoch, its images decoded once or by workers.

Everything random is a pure function of (seed, epoch, place in the epoch). So a run resumed at an epoch's start needs no
saved sampler state, and neither the number of processes nor the number of workers changes what is seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import InputError, RunError
from ..augment.auto_augment import TimmAugment
from ..augment.transforms import BatchAugment, Fit, Policy, build_augment, build_crop, get_policy
from ..image_set import ImageSet
from .batches import Batches, collate, generator_of, torch_seed
from .orders import (
    BATCH,
    SAMPLE,
    STRONG,
    ClassBalancedOrder,
    Order,
    SequentialOrder,
    Shares,
    ShuffledOrder,
    check_integer,
)
from .stream_batches import StreamBatches
from .streaming import StreamedSet


def decode(image_set: ImageSet, size: int | None = None) -> Tensor:
    """All images of a set, uint8 [N, H, W, 3]; fitted to size x size if given (shorter side, then centre crop).

    Raises `RunError`, naming the row, for an image that cannot be read;
    `InputError` if sizes differ and none is given.
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
    """Batches of a set of small images that is held decoded, on `device`, and augmented a batch at a time.

    Yields (images float32 [b, 3, S, S] channels last, labels int64 [b]) on `device`. The random choices of a step are
    drawn for the global batch and then cut, so they do not depend on the number of processes. A policy with
    `auto_augment` is held on the CPU, where Pillow changes image by image, and has draws of its own.

    pixels: uint8 [N, S, S, 3]; labels: [N].
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: ArrayLike,
        policy: str | Policy,
        *,
        order: Order,
        shares: Shares,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(order, shares, seed, device)
        labels = np.asarray(labels, dtype=np.int64)
        if (
            pixels.dtype != torch.uint8
            or pixels.ndim != 4
            or pixels.shape[1] != pixels.shape[2]
            or pixels.shape[3] != 3
        ):
            raise InputError(f"pixels must be uint8 [N, S, S, 3], not {pixels.dtype} {list(pixels.shape)}")
        if len(labels) != len(pixels):
            raise InputError(f"{len(pixels)} images have {len(labels)} labels")
        policy, size = get_policy(policy), pixels.shape[1]
        self.auto_augment = None
        if shares.train and policy.auto_augment is not None:
            self.auto_augment = TimmAugment(policy.auto_augment, size, policy.mean)
        self.pixels = pixels.cpu() if self.auto_augment else pixels.to(self.device)
        self.stream = BATCH if self.auto_augment is None else STRONG
        self.labels = torch.from_numpy(labels).to(self.device)
        self.augment = BatchAugment(policy, size, self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = torch.from_numpy(self.order(epoch))
        labels = self.labels.index_select(0, order.to(self.device))
        order = order.to(self.pixels.device)
        for step, start, stop, low, high in self.shares:
            images = self.pixels.index_select(0, order[low:high])
            if self.shares.train:
                generator = torch.Generator().manual_seed(torch_seed(self.seed, self.stream, epoch, step))
                draws = self.augment.draw(stop - start, generator).part(low - start, high - start)
                if self.auto_augment:
                    seeds = torch.randint(2**32, (stop - start,), generator=generator)[low - start : high - start]
                    images = self.auto_augment.batch(images, seeds)
                    if self.device.type == "cuda":
                        images = images.pin_memory()  # from ordinary memory the GPU would be waited for
                    images = images.to(self.device, non_blocking=True)
                images = self.augment(images, draws)
            else:
                images = self.augment.normalize(images)
            yield images, labels[low:high]


class _Samples:
    """Map-style data set for the workers: (epoch, position in the epoch, index) -> (image [3, H, W], label)."""

    def __init__(
        self,
        image_set: ImageSet,
        policy: Policy,
        train: bool,
        input_size: int | None,
        seed: int,
        reduced_decode: bool,
    ) -> None:
        self.image_set, self.train, self.seed = image_set, train, seed
        self.crop = build_crop(policy, train, input_size, reduced_decode)
        self.augment = build_augment(policy, train, input_size)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int] | RunError:
        epoch, position, index = key
        if not self.train:
            return self._sample(index)
        with generator_of(self.seed, SAMPLE, epoch, position):
            return self._sample(index)

    def _sample(self, index: int) -> tuple[Tensor, int] | RunError:
        try:
            image, label = self.image_set.read(index, self.crop)
        except RunError as error:
            return error  # raised in a worker, it would arrive buried in a traceback
        return self.augment(image), label


class WorkerBatches(Batches):
    """Batches of large images, decoded and augmented one by one, by worker processes if there are any.

    Yields as `TensorBatches` does. A sample's random choices depend on the seed, the epoch and its position in the
    epoch only; the global generators are neither read nor moved. reduced_decode: as in `build_crop`.
    """

    def __init__(
        self,
        image_set: ImageSet,
        policy: str | Policy,
        *,
        order: Order,
        shares: Shares,
        seed: int,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        input_size: int | None = None,
        reduced_decode: bool = True,
    ) -> None:
        super().__init__(order, shares, seed, device)
        num_workers = check_integer(num_workers, "number of workers", 0)
        self.keys = _Keys(order, shares)
        self.loader = DataLoader(
            _Samples(image_set, get_policy(policy), shares.train, input_size, self.seed, reduced_decode),
            batch_sampler=self.keys,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers else None,  # a worker; each batch of 256 at 224 pixels takes 154 MB
            generator=torch.Generator(),  # its own: DataLoader draws a base seed, even if nobody uses it
        )

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.keys.epoch = self.epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if isinstance(batch, RunError):
                try:
                    raise batch
                finally:  # frame and error would hold each other, and workers found by the garbage collector stop late
                    del batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Keys:
    """Batch sampler: this rank's (epoch, position, index) of every step. The keys bring the epoch to the workers.

    It does not know its `WorkerBatches`: in a reference cycle, the queues would be finalised before the workers are
    told to stop, and each would take five seconds to notice.
    """

    def __init__(self, order: Order, shares: Shares) -> None:
        self.order, self.shares, self.epoch = order, shares, 0

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch = self.epoch
        order = self.order(epoch)
        for share in self.shares:
            yield [(epoch, position, int(order[position])) for position in range(share.low, share.high)]


def make_loader(
    image_set: ImageSet | StreamedSet,
    policy: str | Policy,
    *,
    train: bool,
    batch_size: int,
    seed: int,
    order: str | None = None,
    rank: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    input_size: int | None = None,
    reduced_decode: bool = True,
    shuffle_buffer: int = 1000,
) -> TensorBatches | WorkerBatches | StreamBatches:
    """The loader of a set: held in memory where the policy is one of small images, else read by workers, or streamed.

    train: shuffle and augment; else every image once, in order, test transform.
    batch_size: over all processes together.
    order: None, or "balanced" to draw classes uniformly (training only).
    input_size: side of the input; the policy's own by default. Small images of another size are resized as decoded.
    reduced_decode: decode large JPEGs at 1/2, 1/4 or 1/8 of their size where that is enough for the input. The crops
        are the same, the pixels nearly so; False decodes in full, for the authors' pixels.
    shuffle_buffer: of a streamed set, how many images a worker holds back to draw from.

    Raises `InputError` for arguments out of range, before an image is read.
    """
    policy = get_policy(policy)
    size = policy.input_size(input_size)
    check_integer(num_workers, "number of workers", 0)
    if len(image_set) == 0:
        raise InputError(f"split {image_set.split!r} has zero images")
    if order not in (None, "balanced") or (order and not train):
        raise InputError(f"unknown order {order!r}; choose None, or 'balanced' for training")
    if isinstance(image_set, StreamedSet):
        if policy.in_memory:
            raise InputError(f"augmentation {policy.name!r} holds all images in memory: leave --streaming out")
        if order == "balanced":
            raise InputError(
                "class-balanced batches draw single images, which a stream cannot: train this stage without --streaming"
            )
        shares = Shares(len(image_set), batch_size, train, rank, num_processes)
        how = dict(num_workers=num_workers, device=device, input_size=size, reduced_decode=reduced_decode)
        return StreamBatches(image_set, policy, shares=shares, seed=seed, shuffle_buffer=shuffle_buffer, **how)
    if order == "balanced":
        chosen = ClassBalancedOrder(image_set.labels, seed)
    else:
        chosen = ShuffledOrder(len(image_set), seed) if train else SequentialOrder(len(image_set))
    shares = Shares(len(image_set), batch_size, train, rank, num_processes)
    common = {"order": chosen, "shares": shares, "seed": seed, "device": device}
    if policy.in_memory:
        return TensorBatches(decode(image_set, size), image_set.labels, policy, **common)
    return WorkerBatches(
        image_set, policy, num_workers=num_workers, input_size=size, reduced_decode=reduced_decode, **common
    )
