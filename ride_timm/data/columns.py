"""Read splits by their columns: images undecoded, labels checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from ..errors import InputError, first_line, listed
from .folders import files_as_dataset, is_image
from .image_set import ImageSet, open_stored
from .longtail import check_labels

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
_BYTES, _TEXT = ("binary", "large_binary", "binary_view"), ("string", "large_string", "string_view")
_EXPECTED = "bytes, {bytes, path}, paths or URLs of image files"
_SEEN = 10  # first rows, one of which should hold an image


def sets_of_columns(
    splits: dict[str, Dataset],
    image_column: str | None,
    label_column: str | None,
    folders: Sequence[Path] = (),
) -> tuple[list[ImageSet], tuple[str, ...]]:
    """Complete sets of these splits, training first, and its class names.

    Labels that are text, true and false, or integers other than 0, 1, 2, … without gaps become classes in sorted order,
    named as they are. folders: see `image_rows`.
    """
    import pyarrow as pa

    (train_split, train), *_ = splits.items()
    label_column = _choose_label_column(train, label_column)
    image_column = choose_image_column(train, image_column, label_column)
    train_names = getattr(train.features[label_column], "names", None)
    by_name = False  # labels are the names of their classes
    sets: list[ImageSet] = []
    for name, split in splits.items():
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise InputError(
                    f"split {name!r} has no column {column!r}; it has {listed(split.column_names)}: give it the "
                    f"columns (or class folders) of split {train_split!r}, name another by --test-split, or move it "
                    "away, and test images are held out of the training images"
                )
        choose_image_column(split, image_column)
        names = getattr(split.features[label_column], "names", None)
        if train_names and names and train_names != names:
            raise InputError(
                f"splits {train_split!r} and {name!r} number their classes differently in {label_column!r}"
            )
        values = _label_values(split, label_column, name)
        numbers = None if _is_text(values) else _checked(values, label_column, name, names)
        if train_names is None and not sets:
            by_name = numbers is None or not _without_gaps(numbers)
            train_names = list(map(str, sorted(values.unique().to_pylist()))) if by_name else None
        if numbers is None or by_name:
            texts = values if numbers is None else values.cast(pa.string())
            labels = _numbered(texts, train_names, f"split {name!r}")
        else:
            labels = numbers
        images = image_rows(split, image_column, folders)
        sets.append(ImageSet(images, np.arange(len(labels)), labels, image_column, name))
    if train_names is not None:
        sets, train_names = _without_unused(sets, train_names)
    try:
        num_classes = check_labels(sets[0].labels, len(train_names) if train_names else None, train_names)[1]
    except InputError as error:
        raise InputError(f"split {train_split!r}, column {label_column!r}: {error}") from error
    for image_set in sets[1:]:
        check_unseen(image_set.labels, num_classes, f"split {image_set.split!r}")
    return sets, tuple(train_names or map(str, range(num_classes)))


def _without_unused(sets: list[ImageSet], names: list[str]) -> tuple[list[ImageSet], list[str]]:
    """The sets without classes of which none has an image, with a warning: a part of a Hub set keeps all its names."""
    used = np.unique(np.concatenate([image_set.labels for image_set in sets]))
    if len(used) == len(names):
        return sets, names
    unused = [names[c] for c in np.setdiff1d(np.arange(len(names)), used)]
    warnings.warn(
        f"no split has an image of {len(unused)} of the {len(names)} named classes, which are left out: "
        f"{listed(unused)}",
        stacklevel=2,
    )
    sets = [replace(image_set, labels=np.searchsorted(used, image_set.labels)) for image_set in sets]
    return sets, [names[c] for c in used]


def check_unseen(labels: np.ndarray, num_classes: int, what: str) -> None:
    """InputError for labels of classes without a training image."""
    unseen = np.unique(labels[labels >= num_classes])
    if len(unseen):
        raise InputError(f"{what} has classes without a training image: {listed(unseen.tolist())}")


def choose_image_column(
    split: Dataset | IterableDataset, column: str | None = None, label_column: str | None = None
) -> str:
    """The named column, or the first of images; `InputError` if there is none.

    Where no column has the type of images, the first but the labels whose first rows hold image files: bytes,
    {bytes, path}, paths or URLs. A named one may hold paths without an extension.
    """
    from datasets import Image

    if split.features is None:  # a stream of CSV
        split = first_rows(split)
    names = list(split.features)
    if column is not None and column not in names:
        raise InputError(f"the data set has no column {column!r}; it has {listed(names)}")
    images = [name for name in names if isinstance(split.features[name], Image)]
    if column in images or (images and column is None):
        return column or next(name for name in (*IMAGE_COLUMNS, *images) if name in images)
    rows = first_rows(split)
    if column is not None:
        if not _may_hold_images(rows.features[column]):
            raise InputError(f"column {column!r} does not hold images but {_kind(rows, column)}: expected {_EXPECTED}")
        return column
    labels = LABEL_COLUMNS if label_column is None else (label_column,)
    for name in (*IMAGE_COLUMNS, *names):
        if name in names and name not in labels and _holds_images(rows, name):
            return name
    raise InputError(
        f"the data set has no image column: it has {listed(f'{name} ({_kind(rows, name)})' for name in names)}, and "
        f"the first rows hold no image file; expected {_EXPECTED}, or the column's name as --image-column"
    )


def first_rows(split: Dataset | IterableDataset) -> Dataset:
    """The first few rows, images undecoded; of a stream, no more are read."""
    from datasets import Dataset, DatasetInfo, Features

    features = split.features
    table = next(iter(split.with_format("arrow").iter(_SEEN)), None)
    if table is None:
        table = (features or Features()).arrow_schema.empty_table()
    return Dataset(table, info=DatasetInfo(features=features))


def image_rows(split: Dataset, column: str, folders: Sequence[Path] = ()) -> Dataset:
    """The image column of a split alone, as images of `datasets`: bytes and paths are not read.

    folders: where relative paths may start; the first that has the first file is chosen. `InputError` if none has it.
    """
    from datasets import Image, Value

    images, feature = split.select_columns([column]), split.features[column]
    if isinstance(feature, Image):
        return images
    if (paths := _paths(images, column)) is not None:
        found = files_as_dataset(_resolved(paths.to_pylist(), folders, column))
        return found if column == "image" else found.rename_column("image", column)
    if _is_value(feature, _BYTES[1:]):  # which not every release of `datasets` casts to images
        images = images.cast_column(column, Value("binary"))
    return images.cast_column(column, Image())


def _paths(images: Dataset, column: str) -> pa.ChunkedArray | None:
    """A column of text, or the paths of structs none of which holds bytes; None for other columns."""
    import pyarrow.compute as pc

    feature = images.features[column]
    if _is_value(feature, _TEXT):
        return images.with_format("arrow")[:].column(column)
    if not isinstance(feature, dict) or "path" not in feature:
        return None
    stored = images.with_format("arrow")[:].column(column)
    if "bytes" in feature and pc.struct_field(stored, "bytes").null_count < len(stored):
        return None
    return pc.struct_field(stored, "path")


def _is_value(feature: Any, kinds: tuple[str, ...]) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype in kinds


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature or "path" in feature
    return _is_value(feature, _BYTES + _TEXT)


def _holds_images(rows: Dataset, column: str) -> bool:
    """True for a column of image files in one of its first rows, and for bytes under a usual name."""
    feature = rows.features[column]
    if not _may_hold_images(feature):
        return False
    values = [value for value in rows.data.column(column).to_pylist() if value]
    first = next(iter(values), None)
    if isinstance(first, dict) and first.get("bytes") is None:
        first = first.get("path")
    if isinstance(first, str):
        return is_image(urlsplit(first).path)
    if column in IMAGE_COLUMNS:
        return True
    return any(_opens(value if isinstance(value, dict) else dict(bytes=value)) for value in values)


def _kind(rows: Dataset, column: str) -> str:
    return str(rows.data.schema.field(column).type)


def _opens(stored: dict[str, Any]) -> bool:
    try:
        return open_stored(dict(bytes=stored.get("bytes"), path=stored.get("path"))) is not None
    except Exception:  # decoders have no common error
        return False


def _resolved(paths: list[str | None], folders: Sequence[Path], column: str) -> list[str | None]:
    """Paths from the first folder that has the first file; URLs and absolute paths as they are; None without one."""
    first = next((path for path in paths if path and "://" not in path and not os.path.isabs(path)), None)
    url = next((path for path in paths if path and "://" in path), None)
    if url is not None:
        _check_url(url, column)
    if first is None:
        return [path or None for path in paths]
    root = next((folder for folder in folders if (folder / first).is_file()), None)
    if root is None:
        raise InputError(
            f"column {column!r} is read as paths of images, and there is no {first} in "
            f"{listed(folders) or 'a Hub set'}: expected paths from the folder of the file, or absolute ones; "
            "--image-column names another column"
        )
    return [str(root / path) if path and "://" not in path else path or None for path in paths]


def _check_url(url: str, column: str) -> None:
    """`InputError` for a URL of a kind that is not read here, for want of a package or at all."""
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise InputError(
            f"column {column!r} holds URLs that cannot be read here, such as {url} ({first_line(error)}): pip install "
            "what is missing, or download the images and list their paths"
        ) from error


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


def _label_values(split: Dataset, column: str, name: str) -> pa.ChunkedArray:
    """The values of a label column, read alone: integers, or text, as which true and false are taken.

    `InputError` for values of other kinds, and for rows without one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import ClassLabel, Value

    if split.num_rows == 0:
        raise InputError(f"split {name!r} has zero images")
    values = split.select_columns([column]).with_format("arrow")[:].column(column)
    where = f"label column {column!r} of split {name!r}"
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy()))
        raise InputError(
            f"{where} has no value in row {row} ({values.null_count} rows in all): name another column by "
            "--label-column, or remove those rows from the data set's files"
        )
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.cast(kind.value_type)
    if str(values.type) == "string_view":  # pyarrow names this type from 16 on
        values = values.cast(pa.string())
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, "true", "false")
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy()
        wide = numbers.astype(np.float64)  # 2**53 is none of float16
        wrong = ~((np.abs(wide) < 2**53) & (wide == np.rint(wide)))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{where} holds {numbers[row]} in row {row}, not a class: name the column of the classes by "
                "--label-column"
            )
        return pa.chunked_array([wide.astype(np.int64)])
    if pa.types.is_integer(values.type) or _is_text(values):
        return values
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        others = [other for other in split.column_names if isinstance(split.features[other], ClassLabel | Value)]
        there = f" (there are {listed(others)})" if others else ""
        raise InputError(
            f"{where} holds lists of labels, and an image has one class here: name a column with one label per image "
            f"by --label-column{there}, or list one class per image in `path label` lines "
            "(--annotations)"
        )
    raise InputError(f"{where} holds {kind}, not classes: name the column of the classes by --label-column")


def _is_text(values: pa.ChunkedArray) -> bool:
    import pyarrow as pa

    return pa.types.is_string(values.type) or pa.types.is_large_string(values.type)


def _numbered(values: pa.ChunkedArray, names: list[str] | None, what: str) -> np.ndarray:
    """Text labels as classes, int64 [N]; `InputError` for those without a training image."""
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = pc.index_in(values, value_set=pa.array(names or [], values.type))
    if labels.null_count:
        unseen = sorted(values.filter(labels.is_null()).unique().to_pylist())
        raise InputError(f"{what} has classes without a training image: {listed(map(repr, unseen))}")
    return labels.to_numpy().astype(np.int64)


def _without_gaps(labels: np.ndarray) -> bool:
    """True for labels 0, 1, 2, …, each present."""
    present = np.unique(labels)
    return bool(present[-1] == len(present) - 1)


def _checked(values: pa.ChunkedArray, column: str, name: str, class_names: list[str] | None) -> np.ndarray:
    """Integer labels as int64 [N]; `InputError` for those that are no class."""
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
