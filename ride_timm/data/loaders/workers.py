"""Batches of large images, decoded and augmented one by one, by workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as T

from ...errors import InputError, RunError
from ..augment.colours import BatchColours, draw_jitter, no_jitter
from ..augment.images import Decoder, Fit, TensorCrop, View, build_crop, decode_full
from ..augment.policies import Policy, get_policy
from ..image_set import ImageSet
from .orders import SAMPLE, Batches, EpochKeys, Order, RankSlices, check_integer, torch_seed


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator for torchvision, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(*key))
        yield


class ViewTransform:
    """Crop an image once, then augment it in each view from the same random state.

    Of two views, the first is that of the weak policy; their crops and flips are the same. Pixels stay uint8: the
    colour jitter drawn here and normalisation are left to the batch, on its device. Where only flips remain here, JPEGs
    are cropped and resized by `TensorCrop`.
    """

    def __init__(
        self,
        policy: str | Policy,
        train: bool,
        input_size: int | None = None,
        decoder: Decoder = decode_full,
        views: int = 1,
    ) -> None:
        self.policy = policy = get_policy(policy)
        policies = [policy.weak, policy][-views:]
        self.views = [View(view, train, input_size) for view in policies]
        self.crop: Callable[[Image], Image | Tensor] = build_crop(policy, train, input_size, decoder)
        flips = train and policy.padding is None and all(view.only_flips for view in self.views)
        if flips and decoder is decode_full:
            self.crop = TensorCrop(policy.input_size(input_size), interpolation=policy.interpolation)
        self.jitters = any(view.jitter is not None for view in self.views)

    def augment(self, image: Image | Tensor) -> tuple[Tensor, Tensor]:
        """Cropped image -> uint8 [V, 3, S, S], and the colour changes left to the batch, [V, K, 2]."""
        state, images, changes = torch.get_rng_state(), [], []
        for view in self.views:
            torch.set_rng_state(state)
            images.append(view(image))
            if self.jitters:
                changes.append(no_jitter() if view.jitter is None else draw_jitter(view.jitter))
        return torch.stack(images), torch.stack(changes) if changes else torch.empty(len(images), 0, 2)


class FiveCrops(ViewTransform):
    """Resize an image as the test transform does; its views are its four corners and its centre.

    torchvision's FiveCrop, at the test transform's crop size. Raises `InputError` where that crop leaves nothing out.
    """

    def __init__(self, policy: str | Policy, input_size: int | None = None, decoder: Decoder = decode_full) -> None:
        self.policy = policy = get_policy(policy)
        size = policy.input_size(input_size)
        if policy.in_memory or policy.resize_at(size) <= size:
            raise InputError(
                f"five crops: the test transform of augmentation {policy.name!r} crops nothing at {size} pixels; "
                "leave --five-crop out."
            )
        fit = Fit(size, policy.resize_at(size), decoder, policy.interpolation, policy.squash)
        self.crop, self.crops = fit.resized, T.FiveCrop(size)
        self.views = [View(policy, False, size)] * 5

    def augment(self, image: Image) -> tuple[Tensor, Tensor]:
        """Resized image -> uint8 [5, 3, S, S], and no colour changes."""
        crops = [view(crop) for view, crop in zip(self.views, self.crops(image), strict=True)]
        return torch.stack(crops), torch.empty(len(crops), 0, 2)


Sample = tuple[Tensor, Tensor, int]  # uint8 [V, 3, S, S], colour changes [V, K, 2], label


def collate(samples: Sequence[Sample | RunError]) -> tuple[Tensor, Tensor, Tensor] | RunError:
    """Collate samples view by view.

    -> images uint8 [V*b, 3, S, S], changes [V*b, K, 2] and labels [b]; or the first error among the samples
    """
    failed = next((sample for sample in samples if isinstance(sample, RunError)), None)
    if failed is not None:
        return failed
    images, changes, labels = zip(*samples, strict=True)
    by_view = (torch.stack(parts, 1).flatten(0, 1) for parts in (images, changes))
    return *by_view, torch.tensor(labels, dtype=torch.int64)


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl+C, which reaches every process of a terminal, to the main process.

    A forked worker has its handler, any other one Python's, which would end the worker before the run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loaded(loader: DataLoader) -> Iterator[Any]:
    """Iterate over a loader; raise the first error that a worker returned."""
    for batch in loader:
        if isinstance(batch, RunError):
            try:
                raise batch
            finally:  # else frame and error form a cycle, and workers freed by the garbage collector stop late
                del batch
        yield batch


class _Samples:
    """Map-style data set for the workers.

    (epoch, position in the epoch, index) -> sample
    """

    def __init__(self, image_set: ImageSet, transform: ViewTransform, train: bool, seed: int) -> None:
        self.image_set, self.transform, self.train, self.seed = image_set, transform, train, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Sample | RunError:
        epoch, position, index = key
        if not self.train:
            return self._sample(index)
        with seeded(self.seed, SAMPLE, epoch, position):
            return self._sample(index)

    def _sample(self, index: int) -> Sample | RunError:
        try:
            image, label = self.image_set.read(index, self.transform.crop)
        except RunError as error:
            return error  # raised in a worker, it would arrive buried in a traceback
        return *self.transform.augment(image), label


class WorkerBatches(Batches):
    """Batches of large images, by worker processes if there are any.

    Yields as `TensorBatches` does. The random choices of an image depend on the seed, the epoch and its position in the
    epoch alone; the global generators are neither read nor advanced.
    """

    def __init__(
        self,
        image_set: ImageSet,
        transform: ViewTransform,
        *,
        order: Order,
        slices: RankSlices,
        seed: int,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(slices, seed, device)
        self.policy = transform.policy
        num_workers = check_integer(num_workers, "number of workers", 0)
        self.keys = _SampleKeys(order, slices)
        self.loader = DataLoader(
            _Samples(image_set, transform, slices.train, self.seed),
            batch_sampler=self.keys,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_interrupts,
            prefetch_factor=2 if num_workers else None,  # per worker; a batch of 256 at 224 pixels takes 39 MB
            generator=torch.Generator(),  # its own: DataLoader always draws a base seed
        )

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.keys.epoch = self.epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        colours = BatchColours(self.policy, self.device)
        for batch in loaded(self.loader):
            images, changes, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield colours(images, changes), labels


class _SampleKeys(EpochKeys):
    """Batch sampler: this rank's (epoch, position, index) of every step; the keys carry the epoch to the workers."""

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for epoch, part, indices in super().__iter__():
            yield [(epoch, position, int(index)) for position, index in enumerate(indices, part.low)]
