"""Streaming: rows of a data set, read shard by shard and never held completely.

Guarantees of a `StreamedSet`, on `datasets`' shards, seeded shuffle buffer and `split_dataset_by_node`:

- The parts of the processes are disjoint and together are all listed images, and so are those of a process' workers.
  Shards are distributed if their number is a multiple of the number of processes; otherwise each process reads every
  shard and takes every n-th image. One process sees every image exactly once per epoch; in evaluation, any number of
  processes do.
- The order follows from seed, epoch, shards, and the numbers of processes and workers: the same run repeats exactly,
  and resumes exactly at the start of an epoch. Other numbers of processes or workers give another order.
- Names cannot be compared beforehand. Where two rows match one listed image, as numbers that restart in every folder
  do, iteration ends with an error at the second one that a process meets.
- Shuffling is of shards, then within a buffer of images: coarser than a permutation. Images of one class that are
  stored next to each other stay close.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterable

from ..errors import InputError, RunError, first_line
from ..hardware import send
from .augment.colours import BatchColours
from .augment.policies import Policy
from .image_set import open_stored
from .lists import AnnotationList, NameKeys
from .loaders.orders import SAMPLE, Batches, RankSlices
from .loaders.workers import Sample, ViewTransform, collate, ignore_interrupts, loaded, seeded

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """The images of an annotation list in a stream of rows with file names.

    source: the rows, images undecoded; keys [n] and labels int64 [n] of the listed images; name_keys: file name of a
    row -> its key; shuffle_buffer: images that a worker holds to draw from, in training.
    """

    source: IterableDataset
    keys: np.ndarray
    labels: np.ndarray
    name_keys: NameKeys
    image_column: str
    split: str
    shuffle_buffer: int

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, positions: ArrayLike) -> StreamedSet:
        """The set of the images at these positions of the list."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(self, keys=self.keys[positions], labels=self.labels[positions])

    def batches(self, policy: Policy, transform: ViewTransform, *, sampler: str, **how: Any) -> StreamBatches:
        """The loader of this set; `InputError` for what a stream cannot do."""
        if policy.in_memory:
            raise InputError(f"augmentation {policy.name!r} holds all images in memory: leave --streaming out")
        if sampler != "instance":
            raise InputError(
                f"sampler={sampler} draws single images, which a stream cannot: train this stage without --streaming"
            )
        return StreamBatches(self, transform, **how)

    @cached_property
    def label_of(self) -> dict[str, int]:
        return dict(zip(self.keys.tolist(), self.labels.tolist(), strict=True))

    def lists(self, row: dict[str, Any]) -> bool:
        """True for a row of a listed image.

        False for rows without an image or a file name, as without streaming.
        """
        stored = row[self.image_column]
        return stored is not None and stored["path"] is not None and self.name_keys(stored["path"]) in self.label_of

    def part(self, rank: int, num_processes: int, shuffle_buffer: int = 0, seed: int = 0) -> Part:
        """A process' part of the stream, in the order of the rows without a buffer."""
        from datasets.distributed import split_dataset_by_node

        rows = self.source.filter(self.lists)  # before the buffer, which then holds listed images only
        if shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        return Part(split_dataset_by_node(rows, rank, num_processes) if num_processes > 1 else rows, self)


@dataclass(frozen=True, eq=False)
class Part:
    """A process' part of a stream, split over its workers.

    Yields (stored image {"bytes", "path"}, key, label).
    """

    rows: IterableDataset
    images: StreamedSet

    def set_pass(self, number: int) -> None:
        """Set the pass, counted from 0; a shuffle buffer orders each anew."""
        self.rows.set_epoch(number)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str, int]]:
        for row in self.rows:
            stored = row[self.images.image_column]
            key = self.images.name_keys(stored["path"])
            yield stored, key, self.images.label_of[key]


def streamed_rows(
    annotations: AnnotationList, source: IterableDataset, image_column: str, split: str, shuffle_buffer: int
) -> StreamedSet:
    """Find the images of a list in a stream; `InputError` without file names."""
    from datasets import Image

    source = source.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    first = next((row[image_column] for row in source if row[image_column] is not None), None)
    if first is None or not first["path"]:
        raise InputError(
            f"split {split!r} cannot be streamed for {annotations.path}: its rows carry no file names to match the list"
        )
    name_keys = NameKeys(annotations.files)
    return StreamedSet(
        source, np.array(name_keys.keys), annotations.labels, name_keys, image_column, split, shuffle_buffer
    )


class _StreamSamples(TorchIterable):
    """A part of a stream, decoded and augmented by the worker that reads it.

    Yields (key, sample). Random choices depend on the seed, the epoch and the image alone, whatever
    process and worker reads it.
    """

    def __init__(self, part: Part, transform: ViewTransform, seed: int) -> None:
        self.part, self.transform, self.seed = part, transform, seed
        self.epoch = 0  # the workers are started anew for every pass, so they see it

    def __iter__(self) -> Iterator[tuple[str, Sample | RunError]]:
        for stored, key, label in self.part:
            with seeded(self.seed, SAMPLE, self.epoch, zlib.crc32(key.encode())):
                yield key, self._sample(stored, key, label)

    def _sample(self, stored: dict[str, Any], key: str, label: int) -> Sample | RunError:
        try:
            opened = open_stored(stored)
            if opened is None:
                raise OSError(f"{stored['path']} is no local file")
            with opened:
                return *self.transform.augment(self.transform.crop(opened)), label
        except Exception as error:  # decoders have no common error
            failed = RunError(f"the image {key} of the stream cannot be read ({first_line(error)})")
            failed.__cause__ = error
            return failed


def _collate(samples: list) -> tuple[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] | RunError:
    keys, images = zip(*samples, strict=True)
    batch = collate(images)
    return batch if isinstance(batch, RunError) else (keys, batch)


class StreamBatches(Batches):
    """Batches of a streamed set.

    Yields as `TensorBatches` does. In training, every process takes the same number of steps, that of an epoch of the
    complete list: one with a smaller part restarts it, one with a larger part leaves its last images out. In evaluation
    each process reads its part once, in batches of varying size.
    """

    def __init__(
        self,
        images: StreamedSet,
        transform: ViewTransform,
        *,
        slices: RankSlices,
        seed: int,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(slices, seed, device)
        self.images, self.policy, self.num_views = images, transform.policy, len(transform.views)
        part = images.part(slices.rank, slices.num_processes, images.shuffle_buffer if slices.train else 0, self.seed)
        self.samples = _StreamSamples(part, transform, self.seed)
        self.loader = DataLoader(
            self.samples,
            batch_size=max(1, slices.batch_size // slices.num_processes),
            num_workers=min(num_workers, part.rows.num_shards),  # more would be idle, and `datasets` would warn
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.samples.epoch = self.epoch
        batches = self._passes() if self.slices.train else self._once()
        colours = BatchColours(self.policy, self.device)
        for batch in batches:
            images, changes, labels = (send(part, self.device) for part in batch)
            yield colours(images, changes), labels

    def _pass(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self.samples.part.set_pass(number)
        met: set[str] = set()
        for keys, batch in loaded(self.loader):
            for key in keys:
                if key in met:  # here, not in a worker: each reads shards of its own
                    raise RunError(
                        f"two rows of split {self.images.split!r} have the name of one listed image, {key}, and a "
                        "stream cannot choose between them: leave --streaming out, to compare folders as well, or list "
                        "paths that differ"
                    )
                met.add(key)
            yield batch

    def _once(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        seen = 0
        for batch in self._pass(0):
            seen += len(batch[-1])
            yield batch
        if self.slices.num_processes == 1 and seen != len(self.images):
            self._raise_incomplete(seen)

    def _raise_incomplete(self, seen: int) -> NoReturn:
        raise RunError(f"the stream gave {seen} of the {len(self.images)} listed images of {self.images.split!r}")

    def _passes(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of this rank's sizes, from as many passes as it takes."""
        sizes = (part.high - part.low for part in self.slices)
        images, changes, labels, size = [], [], [], next(sizes)
        for again in count():
            seen = 0
            # further passes are numbered beyond all epochs, so that no epoch has their order
            batches = self._pass(self.epoch + again * 1_000_000)
            for more_images, more_changes, more_labels in batches:
                images.append(more_images.unflatten(0, (self.num_views, -1)))
                changes.append(more_changes.unflatten(0, (self.num_views, -1)))
                labels.append(more_labels)
                seen += len(more_labels)
                held = sum(map(len, labels))
                while held >= size:
                    joined, drawn, targets = torch.cat(images, 1), torch.cat(changes, 1), torch.cat(labels)
                    yield joined[:, :size].flatten(0, 1), drawn[:, :size].flatten(0, 1), targets[:size]
                    images, changes, labels = [joined[:, size:]], [drawn[:, size:]], [targets[size:]]
                    held -= size
                    size = next(sizes, 0)
                    if not size:
                        if self.slices.num_processes == 1 and not again:
                            next(batches, None)  # a pass has as many images as the list, unless a name comes twice
                        return
            if not seen:
                raise RunError(
                    f"this process' part of split {self.images.split!r} holds none of the listed images: use fewer "
                    "processes"
                )
            if self.slices.num_processes == 1 and not again:  # the pass has ended before the list
                self._raise_incomplete(seen)
