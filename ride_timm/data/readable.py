"""Read every image of a set before training, and leave unreadable ones out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, RunError, listed
from ..progress import progress_bar
from .image_set import ImageSet, LongTailData

Unreadable = list[tuple[int, str]]  # the row in its split, and the error


class _Errors(Dataset):
    """Item i is the error of an image, or None if it can be read."""

    def __init__(self, image_set: ImageSet, positions: Sequence[int]) -> None:
        self.image_set, self.positions = image_set, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> tuple[int, str] | None:
        position = self.positions[i]
        try:
            self.image_set[position]
        except RunError as error:
            return int(self.image_set.rows[position]), str(error)
        return None


def find_unreadable(image_set: ImageSet, num_workers: int = 0, rank: int = 0, num_processes: int = 1) -> Unreadable:
    """Decode all images of a set, or this process' part of them, with a progress bar; returns the unreadable ones."""
    images = _Errors(image_set, range(rank, len(image_set), num_processes))
    found: Unreadable = []
    with progress_bar(total=len(images), desc=f"reading {image_set.split}", disable=rank > 0) as bar:
        for errors in DataLoader(images, 32, num_workers=num_workers, collate_fn=list):
            found += [error for error in errors if error is not None]
            bar.update(len(errors))
    return found


def leave_out(data: LongTailData, unreadable: Unreadable) -> LongTailData:
    """The data without these training images; InputError for a class that has no other.

    unreadable: rows of the training split.
    """
    if not unreadable:
        return data
    keep = ~np.isin(data.train.rows, [row for row, _ in unreadable])
    left = replace(data, train=data.train.select(np.flatnonzero(keep)), unreadable=tuple(unreadable))
    empty = [data.class_names[c] for c in np.flatnonzero(np.array(left.class_counts) == 0).tolist()]
    if empty:
        raise InputError(f"no training image of {listed(empty)} can be read: {unreadable[0][1]}")
    return left
