"""Where images and labels come from: the embedded set, the Hub, or a local folder, all through HF `datasets`.

Reading a data set touches labels only; an image is decoded when it is asked for. `datasets` is heavy and is imported
where it is used.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import as_file, files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike

from ..errors import InputError, RunError
from .longtail import check_imbalance, check_labels, longtail_indices
from .reduced_decode import upright

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

EMBEDDED = "fashion_lt"
HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
TEST_SPLITS = ("test", "validation", "val")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Some rows of one split, with their labels. Item i is (RGB image, label); nothing is decoded before.

    images: the whole split; rows int64 [n]: the rows of it that belong to this set, in order; labels int64 [n].
    """

    images: Dataset
    rows: np.ndarray
    labels: np.ndarray
    image_column: str
    split: str = "train"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image, int]:
        return self.read(i, upright)

    def read(self, i: int, load: Callable[[Image], Image]) -> tuple[Image, int]:
        """(what `load` makes of the image, label). `load` is given the image as opened, not yet decoded, so it can
        decode less than all of it; see `reduced_decode`.

        Raises `RunError`, naming split and row, for an image that is missing or that cannot be read.
        """
        row = int(self.rows[i])
        where = f"the image in row {row} of split {self.split!r}"
        try:
            opened = self._open(row)
            if opened is not None:
                with opened:
                    return load(opened), int(self.labels[i])
        except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, …
            raise RunError(f"{where} cannot be read ({_first_line(error)})") from error
        raise RunError(f"{where} is missing: the row holds none")

    @cached_property
    def _stored(self) -> Dataset:
        """The split, its images as they are stored: {"bytes", "path"}; without bytes, the path leads to them."""
        from datasets import Image

        return self.images.cast_column(self.image_column, Image(decode=False))

    def _open(self, row: int) -> Image | None:
        """The image of this row of the split, undecoded if its bytes are at hand; None where the row holds none."""
        stored = self._stored[row][self.image_column]
        if stored is None:
            return None
        if self.images.features[self.image_column].mode is None:
            if stored["bytes"] is not None:
                return PIL.Image.open(BytesIO(stored["bytes"]))
            if stored["path"] is not None and Path(stored["path"]).is_file():
                return PIL.Image.open(stored["path"])
        return self.images[row][self.image_column]  # `datasets` knows how: a URL, or a mode the column imposes

    def select(self, positions: ArrayLike) -> ImageSet:
        """The set of the images at these positions of this one, in the given order."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])


@dataclass(frozen=True, eq=False)
class LongTailData:
    """A long-tailed training set and its test set. Every class has a training image; the test set may lack classes."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    name: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def class_counts(self) -> list[int]:
        """Training images of each class, [C]."""
        return np.bincount(self.train.labels, minlength=self.num_classes).tolist()


def load_longtail(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    imb_type: str = "exp",
    imb_factor: float = 0.01,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
) -> LongTailData:
    """Read a data set and make its training split long-tailed, from the label column alone.

    dataset: "fashion_lt" (in the package, long-tailed already: read as imb_type "none"), "cifar10", "cifar100", a Hub
        id "owner/name", or a local path: a folder `datasets.load_dataset` reads (parquet, images in train/ and test/
        by class, …) or one written by `save_to_disk`.
    data_dir: read the data set from this local path instead, whatever its name.
    imb_type, imb_factor, seed: see `longtail_indices`; "none" keeps the training split as it is.
    image_column, label_column: default to the first image column (`img` and `image` preferred), and to the first of
        fine_label, label, labels.
    test_split: default the first of test, validation, val.

    Raises `InputError` where the data set is not found or its splits, columns or labels do not serve.
    """
    check_imbalance(imb_type, imb_factor, seed)
    if dataset == EMBEDDED and data_dir is not None:
        raise InputError(f"data set {EMBEDDED!r} lies in the package: name the data set that {str(data_dir)!r} holds")
    splits = _read_splits(str(dataset), data_dir)
    if dataset == EMBEDDED:
        if (imb_type, imb_factor, seed) != ("exp", 0.01, 0) and imb_type != "none":
            raise InputError(
                f"data set {EMBEDDED!r} is long-tailed already (exp, factor 0.01): leave imb_type, imb_factor and the "
                "split's seed out, or choose another data set"
            )
        imb_type = "none"
    test_split = _choose_test_split(splits, train_split, test_split)
    train, test = splits[train_split], splits[test_split]

    image_column = _choose_image_column(train, image_column)
    label_column = _choose_label_column(train, label_column)
    for column in (image_column, label_column):
        if column not in test.column_names:
            raise InputError(f"split {test_split!r} has no column {column!r}; it has {_listed(test.column_names)}")
    _choose_image_column(test, image_column)

    train_names, test_names = (getattr(part.features[label_column], "names", None) for part in (train, test))
    if train_names and test_names and train_names != test_names:
        raise InputError(
            f"splits {train_split!r} and {test_split!r} number their classes differently in {label_column!r}"
        )
    train_labels = _read_labels(train, label_column, train_split, train_names)
    test_labels = _read_labels(test, label_column, test_split, test_names)
    try:
        train_labels, num_classes = check_labels(train_labels, len(train_names) if train_names else None)
    except InputError as error:
        raise InputError(f"split {train_split!r}, column {label_column!r}: {error}") from error
    unseen = np.unique(test_labels[test_labels >= num_classes])
    if len(unseen):
        raise InputError(f"split {test_split!r} has classes without a training image: {_listed(unseen.tolist())}")

    rows = longtail_indices(train_labels, imb_type, imb_factor, seed, num_classes)
    return LongTailData(
        train=ImageSet(train.select_columns([image_column]), rows, train_labels[rows], image_column, train_split),
        test=ImageSet(
            test.select_columns([image_column]), np.arange(len(test_labels)), test_labels, image_column, test_split
        ),
        class_names=tuple(train_names or map(str, range(num_classes))),
        name=str(dataset),
    )


def hold_out(image_set: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off a seeded, stratified share of a training set for choosing among epochs: (the rest, held out).

    Each class gives its rounded share but keeps at least one image, so a class of one gives none. Both parts keep the
    order of the original. Raises `InputError` for a fraction outside (0, 0.5] or one too small to hold out an image.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 0.5:
        raise InputError(f"held-out fraction {fraction!r} is outside (0, 0.5]")
    held = np.zeros(len(image_set), dtype=bool)
    rng = np.random.default_rng([_seed(seed), 0x401D])
    _, counts = np.unique(image_set.labels, return_counts=True)
    for members in np.split(np.argsort(image_set.labels, kind="stable"), np.cumsum(counts)[:-1]):
        rng.shuffle(members)
        held[members[: min(math.floor(len(members) * fraction + 0.5), len(members) - 1)]] = True
    if not held.any():
        raise InputError(f"held-out fraction {fraction:g} of {len(image_set)} images holds out none; raise it")
    return image_set.select(np.flatnonzero(~held)), image_set.select(np.flatnonzero(held))


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed {seed!r} is not a non-negative integer")
    return int(seed)


def _read_splits(dataset: str, data_dir: str | Path | None) -> dict[str, Dataset]:
    """The splits by name, from the package, a local path or the Hub, in that order of question."""
    if data_dir is not None:
        return _read_local(Path(data_dir).expanduser())
    if dataset == EMBEDDED:
        return _read_embedded()
    if dataset in HUB_IDS:
        return _read_hub(HUB_IDS[dataset], dataset)
    path = Path(dataset).expanduser()
    if dataset and path.exists():
        return _read_local(path)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset):
        return _read_hub(dataset, dataset)
    raise InputError(
        f"unknown data set {dataset!r}: neither one of {EMBEDDED}, {', '.join(HUB_IDS)}, nor a Hub id owner/name, "
        "nor an existing folder"
    )


def _read_embedded() -> dict[str, Dataset]:
    from datasets import Dataset
    from pyarrow import parquet

    def read(split: str) -> Dataset:
        # into memory: a set this small needs no copy in the datasets cache
        with as_file(files(__package__) / EMBEDDED / f"{split}.parquet") as path:
            return Dataset(parquet.read_table(path))

    return {split: read(split) for split in ("train", "test")}


def _read_hub(hub_id: str, name: str) -> dict[str, Dataset]:
    import datasets

    with _quiet(datasets):
        try:
            splits = datasets.load_dataset(hub_id)
        except Exception as error:  # no network, no such repository, gated, no images: one way out for all
            folder = f" (there is no folder {hub_id!r} here either)" if hub_id == name else ""
            raise InputError(
                f"cannot read data set {name!r} from https://huggingface.co/datasets/{hub_id}{folder}: "
                f"{_first_line(error)}; check the name and the network, or give a local copy with --data-dir"
            ) from error
    return dict(splits)


def _read_local(path: Path) -> dict[str, Dataset]:
    import datasets

    if not path.exists():
        raise InputError(f"data set folder {str(path)!r} does not exist")
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(f"{str(path)!r} is a file; give the folder that holds the data set, or a .parquet file")
    with _quiet(datasets):
        try:
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                splits = datasets.load_from_disk(str(path))
            elif path.is_file():
                splits = datasets.load_dataset("parquet", data_files=str(path))
            else:
                splits = datasets.load_dataset(str(path))
        except Exception as error:  # empty or mixed folders, broken parquet, …: datasets has no common error
            raise InputError(
                f"cannot read a data set from {str(path)!r}: {_first_line(error)}; it should hold parquet files, "
                "folders of images by class under train/ and test/, or what save_to_disk wrote, and no empty split"
            ) from error
    return dict(splits) if isinstance(splits, dict) else {"train": splits}


@contextmanager
def _quiet(datasets) -> Iterator[None]:
    """No progress bars and no retry warnings while reading: the error says once what they say many times."""
    from datasets.utils import are_progress_bars_disabled

    hub_log = logging.getLogger("huggingface_hub")
    level, bars = hub_log.level, not are_progress_bars_disabled()
    hub_log.setLevel(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub_log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _choose_test_split(splits: dict[str, Dataset], train_split: str, test_split: str | None) -> str:
    if train_split not in splits:
        raise InputError(f"the data set has no split {train_split!r}; it has {_listed(splits)}")
    if test_split is None:
        test_split = next((split for split in TEST_SPLITS if split in splits and split != train_split), None)
        if test_split is None:
            raise InputError(f"the data set has no split {' or '.join(TEST_SPLITS)}; name one of {_listed(splits)}")
    if test_split not in splits:
        raise InputError(f"the data set has no split {test_split!r}; it has {_listed(splits)}")
    if test_split == train_split:
        raise InputError(f"split {train_split!r} cannot be both the training and the test set")
    return test_split


def _choose_image_column(split: Dataset, column: str | None) -> str:
    from datasets import Image

    found = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    if column is None:
        column = next((name for name in (*IMAGE_COLUMNS, *found) if name in found), None)
        if column is None:
            raise InputError(
                f"the data set has no image column; it has {_listed(split.column_names)}; "
                "make one with dataset.cast_column(name, datasets.Image())"
            )
    elif column not in split.column_names:
        raise InputError(f"the data set has no column {column!r}; it has {_listed(split.column_names)}")
    if column not in found:
        raise InputError(
            f"column {column!r} does not hold images; see dataset.cast_column({column!r}, datasets.Image())"
        )
    return column


def _choose_label_column(split: Dataset, column: str | None) -> str:
    if column is None:
        column = next((name for name in LABEL_COLUMNS if name in split.column_names), None)
        if column is None:
            raise InputError(
                f"the data set has no label column {' or '.join(LABEL_COLUMNS)}; it has {_listed(split.column_names)}: "
                "name the one that holds the classes"
            )
    if column not in split.column_names:
        raise InputError(f"the data set has no column {column!r}; it has {_listed(split.column_names)}")
    return column


def _read_labels(split: Dataset, column: str, name: str, class_names: list[str] | None) -> np.ndarray:
    """Labels [N] of a split as int64, read from their column alone."""
    import pyarrow as pa

    if split.num_rows == 0:
        raise InputError(f"split {name!r} has zero images")
    values = split.select_columns([column]).with_format("arrow")[:].column(column)
    if not pa.types.is_integer(values.type) and values.null_count < len(values):
        raise InputError(
            f"label column {column!r} of split {name!r} holds {values.type}, not class numbers; "
            f"encode it with dataset.class_encode_column({column!r})"
        )
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy()))
        raise InputError(
            f"label column {column!r} of split {name!r} has no value in row {row} ({values.null_count} rows in all); "
            f"drop those rows, or encode them with dataset.class_encode_column({column!r}, include_nulls=True)"
        )
    labels = values.to_numpy()
    num_classes = len(class_names) if class_names else np.iinfo(np.int64).max
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.all():
        raise InputError(
            f"split {name!r} is unlabelled: no label in {column!r} is a class (row 0 has {labels[0]}); "
            "name another split"
        )
    if wrong.any():
        row = int(np.argmax(wrong))
        allowed = f"0 … {num_classes - 1}" if class_names else "0, 1, 2, …"
        raise InputError(f"label {labels[row]} in row {row} of split {name!r}, column {column!r}, is outside {allowed}")
    return labels.astype(np.int64)


def _listed(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    text = re.sub(r" <[\w.]+ object at 0x\w+>", "", text)[:200].rstrip(".")  # an address helps nobody
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
