"""Load a long-tailed data set: the embedded one, from the Hub, or from a local folder, through HF `datasets`.

Loading reads labels only; images are decoded on access. `datasets` is heavy and imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, listed
from .datasets import EMBEDDED, KNOWN, default_profile, lists_of
from .hub import holds_rows, is_hub_id, is_saved, read_hub, read_local, read_selection, read_splits
from .image_set import ImageSet, LongTailData
from .lists import (
    check_classes,
    check_first_images,
    files_as_dataset,
    find_lists,
    hub_split,
    image_root,
    read_list,
    rows_of,
)
from .longtail import IMB_FACTOR, check_imbalance, check_labels, longtail_indices
from .streaming import streamed_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from .lists import AnnotationList

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
TEST_SPLITS = ("test", "validation", "val")
VAL_SPLITS = ("val", "validation")


def load_longtail(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    imb_type: str | None = None,
    imb_factor: float = IMB_FACTOR,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    annotations: str | Path | None = None,
    use_val: bool | None = False,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
) -> LongTailData:
    """Read a data set and make its training split long-tailed, from the labels alone.

    dataset: a name of `datasets.KNOWN`, a Hub id "owner/name", or a local path: a folder that `datasets.load_dataset`
        reads (parquet, images by class in train/ and test/, ...) or one of `save_to_disk`.
    data_dir: read the data set from this local path instead, whatever its name; a folder of `save_longtail` holds its
        selected images.
    imb_type, imb_factor, seed: see `longtail_indices`; by default "exp" for the balanced data sets of the table, and
        "none", the training split as it is, for all others.
    image_column, label_column: default the first image column (`img` and `image` preferred), and the first of
        fine_label, label, labels.
    test_split: default the first of test, validation, val.
    annotations: folder of annotation lists, from which images and classes are read. The images are files under
        `data_dir`, or the rows of that name in its parquet files or in the Hub data set.
    use_val: read the validation split as well, as `val`; None: if there is one.
    streaming, shuffle_buffer: with lists, and rows that have file names: stream the rows, see `streaming`.

    Raises `InputError` if the data set is not found, or for unusable splits, columns or labels.
    """
    dataset, data_dir, annotations = str(dataset), _expanded(data_dir), _expanded(annotations)
    profile = profile_of(dataset, imb_type, imb_factor, seed)
    if dataset in EMBEDDED and (data_dir or annotations) is not None:
        given = str(data_dir or annotations)
        raise InputError(f"data set {dataset!r} is embedded in the package: name the data set that {given!r} holds")
    saved = data_dir is not None and is_saved(data_dir)
    if saved:
        wanted = dict(dataset=dataset, imb_type=profile, imb_factor=imb_factor, seed=seed)
        _check_selection(data_dir, annotations, wanted)
        profile = "none"  # selected already
    if not saved and (annotations is not None or lists_of(dataset)):
        paths = find_lists(dataset, data_dir, annotations)
        names = _split_names(paths, train_split, test_split, use_val)
        make_set = partial(streamed_rows, shuffle_buffer=shuffle_buffer) if streaming else _matched_rows
        lists = {name: read_list(paths[name]) for name in names}
        sets, class_names = _from_lists(dataset, data_dir, lists, image_column, streaming, make_set)
    elif streaming:
        raise InputError(
            "streaming needs annotation lists of the images to expect: pass --annotations, or leave it out"
        )
    else:
        splits = read_splits(dataset, data_dir)
        names = _split_names(splits, train_split, test_split, use_val)
        sets, class_names = _from_columns({name: splits[name] for name in names}, image_column, label_column)
    train, test, *val = sets
    rows = longtail_indices(train.labels, profile, imb_factor, seed, len(class_names))
    return LongTailData(
        train.select(rows), test, class_names, dataset, val[0] if val else None, tuple(names), len(train)
    )


def profile_of(dataset: str, imb_type: str | None, imb_factor: float, seed: int) -> str:
    """The long-tailed profile to select by; `InputError` for settings that do not suit the data set."""
    profile = imb_type or default_profile(dataset)
    check_imbalance(profile, imb_factor, seed)
    known = KNOWN.get(dataset)
    already = known is not None and not known.balanced
    if already and (profile, imb_factor, seed) == ("exp", known.imb_factor, 0):
        return "none"  # stated, though it is how the data set was made
    if already and (profile != "none" or imb_factor != IMB_FACTOR):
        raise InputError(
            f"data set {dataset!r} is long-tailed already: leave imb_type, imb_factor and the split's seed out, or "
            "choose another data set"
        )
    if profile == "none" and imb_factor != IMB_FACTOR:
        raise InputError(f"imb_factor={imb_factor:g} needs a long-tailed profile: add --imb-type exp or step")
    return profile


def _check_selection(data_dir: Path, annotations: Path | None, wanted: dict[str, Any]) -> None:
    """InputError if a saved folder does not hold the wanted selection; "none" has no factor and seed."""
    if annotations is not None:
        raise InputError(f"folder {str(data_dir)!r} holds selected images: leave --annotations out")
    saved = read_selection(data_dir)
    free = ("imb_factor", "seed") if wanted["imb_type"] == "none" else ()
    differing = [key for key, value in wanted.items() if key not in free and saved[key] != value]
    if differing:
        held, asked = (", ".join(f"{key}={values[key]}" for key in differing) for values in (saved, wanted))
        raise InputError(
            f"folder {str(data_dir)!r} was saved with {held}, not {asked}: save the other selection as well"
        )


def _split_names(splits: Iterable[str], train_split: str, test_split: str | None, use_val: bool | None) -> list[str]:
    """The names of the training, test and, if requested, validation split."""
    splits = list(splits)
    if train_split not in splits:
        raise InputError(f"the data set has no split {train_split!r}; it has {listed(splits)}")
    if test_split is None:
        test_split = next((name for name in TEST_SPLITS if name in splits and name != train_split), None)
        if test_split is None:
            raise InputError(f"the data set has no split {' or '.join(TEST_SPLITS)}; name one of {listed(splits)}")
    if test_split not in splits:
        raise InputError(f"the data set has no split {test_split!r}; it has {listed(splits)}")
    if test_split == train_split:
        raise InputError(f"split {train_split!r} cannot be both the training and the test set")
    names = [train_split, test_split]
    if use_val is False:
        return names
    val_split = next((name for name in VAL_SPLITS if name in splits and name not in names), None)
    if val_split is None:
        if use_val is None:
            return names
        raise InputError(
            f"the data set has no validation split beside {train_split!r} and {test_split!r}; it has {listed(splits)}: "
            "hold out training images instead (--holdout 0.1)"
        )
    return [*names, val_split]


def _from_columns(
    splits: dict[str, Dataset], image_column: str | None, label_column: str | None
) -> tuple[list[ImageSet], tuple[str, ...]]:
    """Complete sets of these splits, the training split first, and the names of its classes."""
    (train_split, train), *_ = splits.items()
    image_column = choose_image_column(train, image_column)
    label_column = _choose_label_column(train, label_column)
    train_names = getattr(train.features[label_column], "names", None)
    sets: list[ImageSet] = []
    for name, split in splits.items():
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
        if not sets:
            try:
                labels, num_classes = check_labels(labels, len(train_names) if train_names else None)
            except InputError as error:
                raise InputError(f"split {name!r}, column {label_column!r}: {error}") from error
        _check_unseen(labels, num_classes, f"split {name!r}")
        sets.append(ImageSet(split.select_columns([image_column]), np.arange(len(labels)), labels, image_column, name))
    return sets, tuple(train_names or map(str, range(num_classes)))


def _from_lists(
    dataset: str,
    data_dir: Path | None,
    lists: dict[str, AnnotationList],
    image_column: str | None,
    streaming: bool,
    make_set: Callable[..., Any],
) -> tuple[list[Any], tuple[str, ...]]:
    """Complete sets of these lists, the training list first, and the names of its classes."""
    train, *others = lists.values()
    published = lists_of(dataset)
    num_classes = check_classes(train, published.num_classes if published else None)
    for other in others:
        _check_unseen(other.labels, num_classes, f"annotation list {other.path}")
    class_names = train.class_names(num_classes)
    if data_dir is not None and not data_dir.exists():
        raise InputError(f"data set folder {str(data_dir)!r} does not exist")
    if data_dir is not None and not holds_rows(data_dir):
        if streaming:
            raise InputError("streaming is for rows of a Hub data set, and files are read one by one: leave it out")
        return [
            _listed_files(part, image_root(dataset, data_dir, part), name) for name, part in lists.items()
        ], class_names
    if data_dir is not None:
        splits = read_local(data_dir, streaming)
    else:
        hub_id = KNOWN[dataset].hub_id if dataset in KNOWN else dataset
        if hub_id is None:
            raise InputError(f"the images of {dataset} are not on the Hub: pass their root as --data-dir")
        if not is_hub_id(hub_id):
            raise InputError(f"no images of {dataset!r}: pass their root as --data-dir, or name a Hub id")
        splits = read_hub(hub_id, dataset, streaming)
    sets = []
    for name, part in lists.items():
        split_name = hub_split(part, name, list(splits))
        split = splits[split_name]
        sets.append(make_set(part, split, choose_image_column(split, image_column), split_name))
    return sets, class_names


def _listed_files(annotations: AnnotationList, root: Path, split: str) -> ImageSet:
    check_first_images(annotations, root)
    rows = np.arange(len(annotations))
    images = files_as_dataset(annotations, root)
    return ImageSet(images, rows, annotations.labels, "image", split, annotations.path)


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
    """Hold out a seeded, stratified fraction of a training set: (the rest, held out).

    The fraction of each class is rounded, but at least one of its images stays. Both parts keep the original order.
    Raises `InputError` for a fraction outside (0, 0.5] or one too small to hold out an image.
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


def choose_image_column(split: Dataset, column: str | None) -> str:
    """The named column, or the first that holds images; `InputError` if there is none."""
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
                "pass the one with the classes as --label-column"
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
