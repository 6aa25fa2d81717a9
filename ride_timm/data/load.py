"""Where images and labels come from: the embedded set, the Hub, or a local folder, all through HF `datasets`.

Reading a data set touches labels only; an image is decoded when it is asked for. `datasets` is heavy and is imported
where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, listed
from .hub import EMBEDDED, holds_rows, is_hub_id, read_hub, read_local, read_splits
from .image_set import ImageSet, LongTailData
from .lists import (
    PUBLISHED,
    check_classes,
    check_first_images,
    files_as_dataset,
    find_lists,
    hub_split,
    image_root,
    read_list,
    rows_of,
)
from .longtail import check_imbalance, check_labels, longtail_indices
from .streaming import streamed_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from .lists import AnnotationList

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
TEST_SPLITS = ("test", "validation", "val")


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
    annotations: str | Path | None = None,
    use_val: bool = False,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
) -> LongTailData:
    """Read a data set and make its training split long-tailed, from the label column alone.

    dataset: "fashion_lt" (in the package), "imagenet_lt", "places_lt", "inat18" (by their annotation lists; these four
        are long-tailed already: read as imb_type "none"), "cifar10", "cifar100", a Hub id "owner/name", or a local
        path: a folder `datasets.load_dataset` reads (parquet, images in train/ and test/ by class, …) or one written by
        `save_to_disk`.
    data_dir: read the data set from this local path instead, whatever its name.
    imb_type, imb_factor, seed: see `longtail_indices`; "none" keeps the training split as it is.
    image_column, label_column: default to the first image column (`img` and `image` preferred), and to the first of
        fine_label, label, labels.
    test_split: default the first of test, validation, val.
    annotations: folder of annotation lists: which images there are, and their classes, is read from these. The images
        are files under `data_dir`, or the rows of that name in the parquet files there or in the Hub data set.
    use_val: read the validation split as well, as `val`.
    streaming: with lists and rows that carry file names only: read the rows in passing (see `streaming`).

    Raises `InputError` where the data set is not found or its splits, columns or labels do not serve.
    """
    check_imbalance(imb_type, imb_factor, seed)
    if dataset == EMBEDDED and (data_dir or annotations) is not None:
        there = str(data_dir or annotations)
        raise InputError(f"data set {EMBEDDED!r} lies in the package: name the data set that {there!r} holds")
    if dataset == EMBEDDED or dataset in PUBLISHED:
        if (imb_type, imb_factor, seed) != ("exp", 0.01, 0) and imb_type != "none":
            raise InputError(
                f"data set {dataset!r} is long-tailed already: leave imb_type, imb_factor and the split's seed out, or "
                "choose another data set"
            )
        imb_type = "none"
    if annotations is not None or dataset in PUBLISHED:
        make_set = partial(streamed_rows, shuffle_buffer=shuffle_buffer) if streaming else _matched_rows
        where = (str(dataset), _expanded(data_dir), _expanded(annotations), image_column, streaming, make_set)
        return _load_annotated(*where, imb_type, imb_factor, seed, train_split, test_split, use_val)
    if streaming:
        raise InputError(
            "streaming needs annotation lists, which say what will come: give --annotations, or leave it out"
        )
    splits = read_splits(str(dataset), data_dir)
    test_split = _choose_test_split(splits, train_split, test_split)
    val_split = _choose_val_split(splits, train_split, test_split) if use_val else None
    train, test = splits[train_split], splits[test_split]

    image_column = choose_image_column(train, image_column)
    label_column = _choose_label_column(train, label_column)
    train_names = getattr(train.features[label_column], "names", None)
    train_labels = _read_labels(train, label_column, train_split, train_names)
    try:
        train_labels, num_classes = check_labels(train_labels, len(train_names) if train_names else None)
    except InputError as error:
        raise InputError(f"split {train_split!r}, column {label_column!r}: {error}") from error

    def whole(split: Dataset, name: str) -> ImageSet:
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise InputError(f"split {name!r} has no column {column!r}; it has {listed(split.column_names)}")
        choose_image_column(split, image_column)
        names = getattr(split.features[label_column], "names", None)
        if train_names and names and train_names != names:
            raise InputError(
                f"splits {train_split!r} and {name!r} number their classes differently in {label_column!r}"
            )
        labels = _read_labels(split, label_column, name, names)
        _check_unseen(labels, num_classes, f"split {name!r}")
        return ImageSet(split.select_columns([image_column]), np.arange(len(labels)), labels, image_column, name)

    test_set = whole(test, test_split)
    rows = longtail_indices(train_labels, imb_type, imb_factor, seed, num_classes)
    return LongTailData(
        train=ImageSet(train.select_columns([image_column]), rows, train_labels[rows], image_column, train_split),
        test=test_set,
        class_names=tuple(train_names or map(str, range(num_classes))),
        name=str(dataset),
        val=whole(splits[val_split], val_split) if val_split else None,
        available=len(train_labels),
    )


def _load_annotated(
    dataset: str,
    data_dir: Path | None,
    annotations: Path | None,
    image_column: str | None,
    streaming: bool,
    make_set: Callable,
    imb_type: str,
    imb_factor: float,
    seed: int,
    train_split: str,
    test_split: str | None,
    use_val: bool,
) -> LongTailData:
    """A data set whose images and classes stand in annotation lists."""
    published = PUBLISHED.get(dataset)
    paths = find_lists(dataset, data_dir, annotations)
    test_split = _choose_test_split(paths, train_split, test_split)
    names = [train_split, test_split] + ([_choose_val_split(paths, train_split, test_split)] if use_val else [])
    lists = [read_list(paths[name]) for name in names]
    num_classes = check_classes(lists[0], published.num_classes if published else None)
    for other in lists[1:]:
        _check_unseen(other.labels, num_classes, f"annotation list {other.path}")
    rows = longtail_indices(lists[0].labels, imb_type, imb_factor, seed, num_classes)
    if data_dir is not None and not data_dir.exists():
        raise InputError(f"data set folder {str(data_dir)!r} does not exist")
    if data_dir is not None and not holds_rows(data_dir):
        if streaming:
            raise InputError("streaming is for rows of a Hub data set; files are read one by one anyway: leave it out")
        sets = [
            _listed_files(part, image_root(dataset, data_dir, part), name)
            for part, name in zip(lists, names, strict=True)
        ]
    else:
        sets = _listed_rows(dataset, data_dir, lists, names, image_column, streaming, make_set)
    train, test, *val = sets
    class_names = lists[0].class_names(num_classes)
    return LongTailData(train.select(rows), test, class_names, dataset, val[0] if val else None, len(lists[0]))


def _listed_files(annotations: AnnotationList, root: Path, split: str) -> ImageSet:
    check_first_images(annotations, root)
    rows = np.arange(len(annotations))
    images = files_as_dataset(annotations, root)
    return ImageSet(images, rows, annotations.labels, "image", split, annotations.path)


def _listed_rows(
    dataset: str,
    data_dir: Path | None,
    lists: list[AnnotationList],
    names: list[str],
    image_column: str | None,
    streaming: bool,
    make_set: Callable,
) -> list[Any]:
    """Each list's images among the rows of parquet files under `data_dir`, or of the data set on the Hub."""
    if data_dir is not None:
        splits = read_local(data_dir, streaming)
    else:
        published = PUBLISHED.get(dataset)
        hub_id = published.hub_id if published else dataset
        if hub_id is None:
            raise InputError(f"the images of {dataset} are not on the Hub: give their root with --data-dir")
        if not is_hub_id(hub_id):
            raise InputError(f"where are the images of {dataset!r}? Give their root with --data-dir, or name a Hub id")
        splits = read_hub(hub_id, dataset, streaming)
    sets = []
    for part, name in zip(lists, names, strict=True):
        split_name = hub_split(part, name, list(splits))
        split = splits[split_name]
        column = choose_image_column(split, image_column)
        sets.append(make_set(part, split, column, split_name))
    return sets


def _matched_rows(annotations: AnnotationList, split: Dataset, image_column: str, split_name: str) -> ImageSet:
    rows = rows_of(annotations, split, image_column, split_name)
    return ImageSet(split.select_columns([image_column]), rows, annotations.labels, image_column, split_name)


def _check_unseen(labels: np.ndarray, num_classes: int, what: str) -> None:
    unseen = np.unique(labels[labels >= num_classes])
    if len(unseen):
        raise InputError(f"{what} has classes without a training image: {listed(unseen.tolist())}")


def _expanded(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


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


def _choose_test_split(splits: dict[str, Any], train_split: str, test_split: str | None) -> str:
    if train_split not in splits:
        raise InputError(f"the data set has no split {train_split!r}; it has {listed(splits)}")
    if test_split is None:
        test_split = next((split for split in TEST_SPLITS if split in splits and split != train_split), None)
        if test_split is None:
            raise InputError(f"the data set has no split {' or '.join(TEST_SPLITS)}; name one of {listed(splits)}")
    if test_split not in splits:
        raise InputError(f"the data set has no split {test_split!r}; it has {listed(splits)}")
    if test_split == train_split:
        raise InputError(f"split {train_split!r} cannot be both the training and the test set")
    return test_split


def _choose_val_split(splits: dict[str, Any], train_split: str, test_split: str) -> str:
    found = next((s for s in ("val", "validation") if s in splits and s not in (train_split, test_split)), None)
    if found is None:
        raise InputError(
            f"the data set has no validation split beside {train_split!r} and {test_split!r}; it has {listed(splits)}: "
            "hold out training images instead (--holdout 0.1)"
        )
    return found


def choose_image_column(split: Dataset, column: str | None) -> str:
    """The named column, or the first that holds images; `InputError` where there is none."""
    from datasets import Image

    found = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    if column is None:
        column = next((name for name in (*IMAGE_COLUMNS, *found) if name in found), None)
        if column is None:
            raise InputError(
                f"the data set has no image column; it has {listed(split.column_names)}; "
                "make one with dataset.cast_column(name, datasets.Image())"
            )
    elif column not in split.column_names:
        raise InputError(f"the data set has no column {column!r}; it has {listed(split.column_names)}")
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
                f"the data set has no label column {' or '.join(LABEL_COLUMNS)}; it has {listed(split.column_names)}: "
                "name the one that holds the classes"
            )
    if column not in split.column_names:
        raise InputError(f"the data set has no column {column!r}; it has {listed(split.column_names)}")
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
