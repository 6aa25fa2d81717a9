"""Annotation lists: the images of a data set and their classes, line by line.

ImageNet-LT and Places-LT (Liu et al. 2019, arXiv:1904.05160) and iNaturalist 2018 are published this way. The paths
are those of files under a root, or of rows of a data set on the Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, listed
from .datasets import LISTED, lists_of
from .folders import files_as_dataset, not_utf8
from .longtail import check_labels

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class AnnotationList:
    """One list: `files` with / between folders, labels int64 [n]. Entry i is line i + 1."""

    path: Path
    files: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def class_names(self, num_classes: int) -> tuple[str, ...]:
        """The folder of each class if every class has one of its own, else its number."""
        present, first = np.unique(self.labels, return_index=True)
        names = {c: PurePosixPath(self.files[i]).parent.name for c, i in zip(present.tolist(), first, strict=True)}
        if len(set(names.values())) < num_classes or "" in names.values():
            return tuple(map(str, range(num_classes)))
        return tuple(names[c] for c in range(num_classes))


def read_list(path: str | Path) -> AnnotationList:
    """Read a list without checking its classes.

    Paths may contain spaces; the label follows the last one.

    Raises `InputError`, naming list and line, for a line without a path or without a label 0, 1, 2, ...
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"annotation list {path} cannot be read: {error}") from error
    if lines == [""]:
        raise InputError(f"annotation list {path} is empty: expected a line `path label` for every image")
    parts = [line.rsplit(None, 1) for line in lines]
    # isascii: isdigit alone takes ², and more than 18 digits do not fit
    wrong = next((i for i, p in enumerate(parts) if len(p) != 2 or not _is_label(p[1])), None)
    if wrong is not None:
        text = lines[wrong].strip()
        if not text:
            what = "is blank"
        elif len(parts[wrong]) < 2:
            what = f"has no label: {text[:100]!r}"
        else:
            what = f"has the label {parts[wrong][1][:100]!r}, not a class number"
        raise InputError(
            f"annotation list {path}: line {wrong + 1} {what}; expected `path label` with label 0, 1, 2, …"
        )
    files = [p[0].strip().replace(os.sep, "/") for p in parts]  # Windows takes both
    return AnnotationList(path, files, np.array([int(p[1]) for p in parts], dtype=np.int64))


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def check_classes(annotations: AnnotationList, num_classes: int | None = None) -> int:
    """The number of classes of a training list.

    num_classes: the expected number; by default the highest label plus one. Raises `InputError`, naming a line, for a
    label beyond it and for classes without an image.
    """
    highest = int(annotations.labels.argmax())
    if num_classes is not None and annotations.labels[highest] >= num_classes:
        raise InputError(
            f"annotation list {annotations.path}: line {highest + 1} has the label {annotations.labels[highest]}, "
            f"outside 0 … {num_classes - 1}"
        )
    try:
        return check_labels(annotations.labels, num_classes)[1]
    except InputError as error:
        where = f"the highest label, {annotations.labels[highest]}, is in line {highest + 1}"
        raise InputError(f"annotation list {annotations.path}: {error} ({where})") from error


def find_lists(dataset: str, data_dir: Path | None, annotations: Path | None) -> dict[str, Path]:
    """The lists of a data set by split.

    They are in `annotations` if given, else in the images' root or its folder PREFIX. Published lists have their
    published names; the names of others end in train.txt, val.txt and test.txt. Raises `InputError` unless there is
    exactly one training list.
    """
    published = lists_of(dataset)
    if annotations is not None:
        folders = [annotations]
    elif published is not None and data_dir is not None:
        folders = [data_dir, data_dir / published.prefix]
    else:
        name = published.name("train") if published else "train.txt"
        raise InputError(
            f"no lists of {dataset}: pass --annotations DIR with {name} and the others, or "
            "--data-dir ROOT that holds them and the images"
        )
    if not folders[0].is_dir():
        raise InputError(f"folder {str(folders[0])!r} does not exist: expected annotation lists in it")
    for folder in folders:
        lists = {}
        for split in SPLITS:
            pattern = published.name(split) if published else f"*{split}.txt"
            found = sorted(folder.glob(pattern))
            if len(found) > 1:
                raise InputError(
                    f"folder {str(folder)!r} has several {split} lists, {listed(p.name for p in found)}: leave "
                    f"one there, or name the data set: {', '.join(LISTED)}"
                )
            if found:
                lists[split] = found[0]
        if "train" in lists:
            return lists
    wanted = published.name("train") if published else "list *train.txt"
    raise InputError(f"there is no {wanted} in {' or '.join(str(folder) for folder in folders)}")


def image_root(dataset: str, data_dir: Path, annotations: AnnotationList) -> Path:
    """The root of the paths: `data_dir`, or its folder PREFIX.

    PREFIX is chosen if the first image is found there only.
    """
    published = lists_of(dataset)
    if published is not None and not os.path.isfile(data_dir / annotations.files[0]):
        inside = data_dir / published.prefix
        if os.path.isfile(inside / annotations.files[0]):
            return inside
    return data_dir


def check_first_images(annotations: AnnotationList, root: Path) -> None:
    """Check that the first image of every class exists.

    A wrong root then fails before training.

    Raises `InputError` with line and path of the first that is missing.
    """
    for i in np.sort(np.unique(annotations.labels, return_index=True)[1]).tolist():
        path = root / annotations.files[i]
        if not os.path.isfile(path):  # False, too, for names that no file system takes
            raise InputError(
                f"annotation list {annotations.path}: the image of line {i + 1} is missing, {path}; "
                "`python -m ride_timm datasets check` lists all that are"
            )


def listed_files(annotations: AnnotationList, root: Path) -> Dataset:
    """The listed files as a data set with one column "image"; none is opened."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # as root / file would: absolute paths stay as they are
    paths = pa.array(annotations.files)
    relative = pa.array([not os.path.isabs(file) for file in annotations.files])
    try:
        start = pa.scalar(str(root))
    except UnicodeEncodeError as error:
        raise not_utf8(error.object) from error
    return files_as_dataset(pc.if_else(relative, pc.binary_join_element_wise(start, paths, "/"), paths))


class NameKeys:
    """Keys that match listed files to rows of a Hub data set.

    A key is the end of the path, without the extension. That is the file name, preceded by as many folders as it takes
    for the listed files to differ and for no two rows to match one of them; with the extension, which the Hub may have
    changed, only if nothing less separates them. The Hub's ImageNet appends the class to a name
    (`n01440764_10026_n01440764.JPEG`); it is removed.

    rows: paths of the rows if they are known beforehand, None for a row without one. Then `row_of` maps a key to its
    row, and `clash` is (file, row, row), by position: the last rows that were hard to separate or, if they still have
    one key or the file has no row, inseparable.
    """

    def __init__(self, files: Sequence[str], rows: Sequence[str | None] = ()) -> None:
        self.row_of: dict[str, int] = {}
        self.clash: tuple[int, int, int] | None = None
        deepest = max(file.count("/") for file in files) + 1
        for self.extension, self.parts in product((False, True), range(1, deepest + 1)):
            self.keys = [self(file) for file in files]
            if len(set(self.keys)) == len(set(files)) and not self._match(rows):
                break

    def __call__(self, path: str) -> str:
        key = "/".join(path.rsplit("/", self.parts)[-self.parts :])
        stem, dot, extension = key.rpartition(".")
        if not dot or "/" in extension:
            stem, dot, extension = key, "", ""
        stem = re.sub(r"(_\d+)_n\d{8}$", r"\1", stem)
        return stem + dot + extension if self.extension else stem

    def _match(self, rows: Sequence[str | None]) -> bool:
        """Find the rows of the keys; True if two rows have the same one."""
        wanted, self.row_of = {key: i for i, key in enumerate(self.keys)}, {}
        for row, path in enumerate(rows):
            key = None if path is None else self(path)
            if key in wanted and self.row_of.setdefault(key, row) != row:
                self.clash = wanted[key], self.row_of[key], row
                return True
        return False


def rows_of(annotations: AnnotationList, split: Dataset, image_column: str, split_name: str) -> np.ndarray:
    """The row of each listed file in a split of a Hub data set, int64 [n].

    Rows are found by their stored file names alone.

    Raises `InputError`, naming the first line, if a file has no row or matches two.
    """
    import pyarrow.compute as pc

    stored = split.select_columns([image_column]).with_format("arrow")[:].column(image_column)
    paths = pc.struct_field(stored, "path").to_pylist()
    keys = NameKeys(annotations.files, paths)
    rows = np.array([keys.row_of.get(key, -1) for key in keys.keys], dtype=np.int64)
    if keys.clash is not None:
        line, *two = keys.clash
        if rows[line] < 0 or keys(paths[two[0]]) == keys(paths[two[1]]):
            raise InputError(
                f"annotation list {annotations.path}: line {line + 1}, {annotations.files[line]}, may be row {two[0]} "
                f"of split {split_name!r}, {paths[two[0]]}, or row {two[1]}, {paths[two[1]]}: expected one row of that "
                "name; list the paths that the rows carry, or give the image files' root with --data-dir"
            )
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        line = int(missing[0])
        example = next((path for path in paths if path), None)
        raise InputError(
            f"annotation list {annotations.path}: {len(missing)} of {len(rows)} images have no row of that name in "
            f"split {split_name!r}, the first in line {line + 1}: {annotations.files[line]} (a row there: {example})"
        )
    return rows


def hub_split(annotations: AnnotationList, own_split: str, splits: Sequence[str]) -> str:
    """The split of a Hub data set with the images of a list.

    That is the split its paths begin with, else its namesake. So ImageNet-LT's validation list (train/n01440764/...)
    refers to "train", its test list (val/...) to "validation".
    """
    first = {file.partition("/")[0] for file in annotations.files}
    wanted = first.pop() if len(first) == 1 else own_split
    for name in (wanted, own_split):
        for candidate in (name, "validation" if name == "val" else name):
            if candidate in splits:
                return candidate
    raise InputError(f"the data set has no split {wanted!r} for {annotations.path}; it has {listed(splits)}")
