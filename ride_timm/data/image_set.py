"""Image sets: labels in memory, images decoded on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from ..errors import RunError, first_line, listed
from .augment.images import open_image, upright

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Loaded = TypeVar("Loaded")


def open_stored(stored: dict[str, Any]) -> Image | None:
    """Open a stored image without decoding it; None if it is not local.

    stored: {"bytes", "path"}, as `datasets` stores images.
    """
    if stored["bytes"] is not None:
        return open_image(stored["bytes"])
    if stored["path"] is not None and "://" not in stored["path"]:
        return open_image(stored["path"])
    return None


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Rows of one split, with their labels.

    Item i is (RGB image, label); images are decoded on access.

    images: the complete split; rows int64 [n]: its rows that belong to this set, in order; labels int64 [n];
    annotations: the list whose lines are the rows of the split, if there is one; advice: the end of the error for an
    image that cannot be read.
    """

    images: Dataset
    rows: np.ndarray
    labels: np.ndarray
    image_column: str
    split: str = "train"
    annotations: Path | None = None
    advice: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image, int]:
        return self.read(i, upright)

    def read(self, i: int, load: Callable[[Image], Loaded]) -> tuple[Loaded, int]:
        """An image, as loaded by `load`, and its label.

        `load` gets the image opened but not decoded, so it may decode a part of it.

        Raises `RunError`, naming split and row (or list and line), for an image that is missing or cannot be read.
        """
        row = int(self.rows[i])
        where = f"the image in row {row} of split {self.split!r}"
        if self.annotations is not None:
            where = f"the image of line {row + 1} of {self.annotations}"
        stored = None
        try:
            stored = self._stored[row][self.image_column]
            opened = None if stored is None else self._open(row, stored)
            if opened is not None:
                with opened:
                    return load(opened), int(self.labels[i])
        except Exception as error:  # decoders have no common error: OSError, SyntaxError, struct.error, ...
            path = stored["path"] if stored else None
            if self.annotations is None and path and path not in str(error):
                where += f", {path},"
            raise RunError(f"{where} cannot be read ({first_line(error)}){self.advice}") from error
        raise RunError(f"{where} is missing: the row holds none{self.advice}")

    @cached_property
    def _stored(self) -> Dataset:
        """The split with its images undecoded, {"bytes", "path"}."""
        from datasets import Image

        return self.images.cast_column(self.image_column, Image(decode=False))

    @cached_property
    def _mode(self) -> str | None:
        """The mode that the image column states; `datasets` copies all features at every access."""
        return self.images.features[self.image_column].mode

    def _open(self, row: int, stored: dict[str, Any]) -> Image | None:
        """The image in a row of the split, undecoded if local; None if missing."""
        if self._mode is None:
            opened = open_stored(stored)
            if opened is not None:
                return opened
        return self.images[row][self.image_column]  # `datasets` reads URLs, and columns with a mode

    def select(self, positions: ArrayLike) -> ImageSet:
        """The set of the images at these positions of this one, in the given order."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])


@runtime_checkable
class BatchSource(Protocol):
    """A set that makes its own batches, since it cannot give single images: a stream."""

    split: str

    def __len__(self) -> int: ...

    def batches(self, policy: Any, transform: Any, *, sampler: str, **how: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class LongTailData:
    """A long-tailed training set and its test set.

    Every class has a training image; the test set may lack classes.

    val: the data set's validation images, if requested; split_names: of the training, test and validation split;
    available: training images before the long-tailed selection; test_held_out: how the test set was held out of the
    training split, such as "0.2 of train, held out with seed 0", if the data set has no test split; unreadable: row and
    error of the training images that were left out as unreadable.
    """

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    name: str
    val: ImageSet | None = None
    split_names: tuple[str, ...] = ("train", "test")
    available: int | None = None
    test_held_out: str | None = None
    unreadable: tuple[tuple[int, str], ...] = ()

    @property
    def test_source(self) -> str:
        """The origin of the test set: "split test", or how it was held out."""
        return self.test_held_out or f"split {self.split_names[1]}"

    @property
    def notice(self) -> str | None:
        """One line on a test set that is not the data set's own."""
        if self.test_held_out is None:
            return None
        notice = f"notice: the data set has no test split; the {len(self.test):,} test images are {self.test_held_out}"
        counts = np.bincount(self.test.labels, minlength=self.num_classes)
        untested = [name for name, count in zip(self.class_names, counts, strict=True) if count == 0]
        if not untested:
            return notice
        return (
            f"{notice}; {len(untested)} of {self.num_classes} classes have too few images for one: {listed(untested)}"
        )

    @property
    def unreadable_notice(self) -> str | None:
        """One line on the training images that were left out."""
        if not self.unreadable:
            return None
        errors = listed(error for _, error in self.unreadable)
        return f"notice: unreadable training images left out, {len(self.unreadable):,}: {errors}"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def in_order(self, classes: Sequence[int]) -> LongTailData:
        """The same data with its classes in another order. classes: each of its classes once."""
        numbers = np.argsort(classes)  # of its classes, in the new order
        parts = {name: part for name in ("train", "test", "val") if (part := getattr(self, name)) is not None}
        parts = {name: replace(part, labels=numbers[part.labels]) for name, part in parts.items()}
        return replace(self, class_names=tuple(self.class_names[c] for c in classes), **parts)

    @cached_property
    def class_counts(self) -> list[int]:
        """Training images of each class, [C]."""
        return np.bincount(self.train.labels, minlength=self.num_classes).tolist()
