"""Images in passing: the rows of a Hub data set or of parquet files, read as they come and never held as a whole.

What holds for a `StreamedSet`, on `datasets`' shards, its seeded shuffle buffer and `split_dataset_by_node`:

- The processes' parts are disjoint and together are all listed images; so are the workers' parts of a process. Whole
  shards are dealt out where their number divides by that of the processes; else each process reads every shard and
  takes every n-th image. One process sees every image exactly once an epoch, in evaluation any number of processes do.
- The order follows from seed, epoch, shards, and the numbers of processes and workers: the same run repeats exactly,
  and resumes exactly at an epoch's start. Other numbers of processes or workers give another order.
- A stream cannot be looked through beforehand. Where two rows answer to one listed image, as numbers that start anew in
  every folder do, `StreamBatches` ends with an error at the second that a process meets.
- Shuffling is of shards, then within a buffer of images: coarser than a permutation. Images of one class that lie
  together in the shards stay near each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InputError
from ..lists import AnnotationList, NameKeys

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """The images of an annotation list, to be met in a stream of rows that carry file names.

    source: the rows, images undecoded; keys [n] and labels int64 [n] of the listed images; name_keys: from a row's file
    name to its key.
    """

    source: IterableDataset
    keys: np.ndarray
    labels: np.ndarray
    name_keys: NameKeys
    image_column: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, positions: ArrayLike) -> StreamedSet:
        """The set of the images at these positions of the list."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(self, keys=self.keys[positions], labels=self.labels[positions])

    @cached_property
    def label_of(self) -> dict[str, int]:
        return dict(zip(self.keys.tolist(), self.labels.tolist(), strict=True))

    def lists(self, row: dict[str, Any]) -> bool:
        """Whether a row is one of the listed images; one without an image or without a name is none, as unstreamed."""
        stored = row[self.image_column]
        return stored is not None and stored["path"] is not None and self.name_keys(stored["path"]) in self.label_of

    def part(self, rank: int, num_processes: int, shuffle_buffer: int = 0, seed: int = 0) -> Part:
        """One process' part of the stream; a shuffle buffer of 0 keeps the order of the rows."""
        from datasets.distributed import split_dataset_by_node

        rows = self.source.filter(self.lists)  # before the buffer, which so holds nothing but images of the list
        if shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        return Part(split_dataset_by_node(rows, rank, num_processes) if num_processes > 1 else rows, self)


@dataclass(frozen=True, eq=False)
class Part:
    """A process' part of a stream: iterating gives (stored image {"bytes", "path"}, key, label), split over workers."""

    rows: IterableDataset
    images: StreamedSet

    def set_pass(self, number: int) -> None:
        """Passes count from 0, each in an order of its own where there is a shuffle buffer."""
        self.rows.set_epoch(number)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str, int]]:
        for row in self.rows:
            stored = row[self.images.image_column]
            key = self.images.name_keys(stored["path"])
            yield stored, key, self.images.label_of[key]


def streamed(annotations: AnnotationList, source: IterableDataset, image_column: str, split: str) -> StreamedSet:
    """The images of a list in a stream of rows; `InputError` where the rows carry no file names."""
    from datasets import Image

    source = source.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    first = next((row[image_column] for row in source if row[image_column] is not None), None)
    if first is None or not first["path"]:
        raise InputError(
            f"split {split!r} cannot be streamed for {annotations.path}: its rows carry no file names to match the list"
        )
    name_keys = NameKeys(annotations.files)
    return StreamedSet(source, np.array(name_keys.keys), annotations.labels, name_keys, image_column, split)
