"""Scan folders of images by class, without opening an image."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, first_line, listed

if TYPE_CHECKING:
    from datasets import Dataset

# the words by which `datasets` recognises the folder of a split, and the separators around them
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_BETWEEN_WORDS = r"[-._ 0-9]+"
_RUN = {"recipe.yaml", "state.pt"}  # files of every run
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# formats that Pillow identifies, but decodes only by another program or library, if at all
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def split_of(name: str) -> str | None:
    """The split that a name stands for in any case, such as Valid or test_set; None for other names."""
    words = set(re.split(_BETWEEN_WORDS, name.lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & known), None)


def split_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of each split: those of the topmost level that has some; empty if there are only classes.

    A class may be called like a split: on a level with other names, the training images are in folders of their own.
    """
    level = [root]
    while level:
        folders = [child for folder in level for child in sorted(folder.iterdir()) if _is_folder(child)]
        by_class = [folder for folder in folders if not any(is_image(name) for name in os.listdir(folder))]
        named = {split: [folder for folder in folders if split_of(folder.name) == split] for split in SPLIT_WORDS}
        found = {split: filled for split, some in named.items() if (filled := [f for f in some if any(files_below(f))])}
        if all(split_of(folder.name) for folder in folders) or set(found.get("train", [])) & set(by_class):
            return found
        level = by_class
    return {}


def scan_classes(root: Path) -> dict[str, Dataset] | None:
    """The splits of a folder of images by class, columns "image" and "label"; None for a folder of another form.

    No image is opened. Rows are in the order of the paths. A class is the folder of its images; where images are at
    different depths, the topmost one, with all below it; names are in NFC, which macOS does not keep. `datasets` reads
    other forms: without images, or with metadata files. Warns of empty class folders, and of files in class folders
    that are no images by their extension. Raises `InputError` for training images outside of class folders, or of one
    class.
    """
    folders = split_folders(root) or {"train": [root]}
    files: dict[str, list[str]] = {}  # images by split
    parents: dict[str, list[str]] = {}  # their folders, relative to that of the split
    others: Counter[str] = Counter()  # files of class folders that are not read, by extension
    for split, some in folders.items():
        files[split], parents[split] = [], []
        for folder in map(str, some):
            for path in files_below(folder):
                parent, _, name = path.rpartition("/")
                if is_image(name):
                    files[split].append(path)
                    within = unicodedata.normalize("NFC", parent[len(folder) + 1 :])
                    parents[split].append(sys.intern(within))  # one string for all images there
                elif name in _METADATA:
                    return None
                elif len(parent) > len(folder):
                    others[os.path.splitext(name)[1].lower() or "no extension"] += 1
    if others:
        kinds = listed(f"{kind} ({count:,})" for kind, count in others.most_common())
        warnings.warn(
            f"files in the class folders under {root} are not read, {others.total():,} in all: {kinds}; Pillow reads "
            "none of these extensions. Convert those that are images, say to .jpg or .png.",
            stacklevel=2,
        )
    if not any(files.values()):
        return None
    if empty := [path for some in folders.values() for folder in some for path in _empty_folders(folder)]:
        warnings.warn(f"class folders without a file are no classes: {listed(empty)}", stacklevel=2)
    by_class = {split: found for split, found in parents.items() if "" not in found}
    if "train" in folders and "train" not in by_class:
        stray = files["train"][parents["train"].index("")]
        raise InputError(
            f"the image {stray} is in no class folder: expected train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg "
            f"alone, under {root}, or a metadata.csv with the columns file_name and label"
        )
    depths = {folder.count("/") for found in by_class.values() for folder in set(found)}
    part = -1 if len(depths) == 1 else 0  # the folder of the images, else the topmost
    class_of = {folder: folder.split("/")[part] for found in by_class.values() for folder in set(found)}
    if part == -1:
        _warn_of_joined(class_of, root)
    names = sorted(set(class_of.values()))
    if len(names) == 1:
        raise InputError(
            f"the images under {root} are of one class, {names[0]!r}: expected a folder for each class, or the path "
            "of a .csv file that lists paths and labels"
        )
    number = {name: i for i, name in enumerate(names)}
    label_of = {folder: number[name] for folder, name in class_of.items()}
    labels = {
        split: np.fromiter((label_of[folder] for folder in found), np.int64, len(found))
        for split, found in by_class.items()
    }
    return {split: files_as_dataset(paths, labels.get(split), names) for split, paths in files.items() if paths}


def _empty_folders(folder: Path) -> list[str]:
    """Paths of the folders in a folder that hold nothing at all."""
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if e.is_dir() and not _is_hidden(e) and _is_empty(e))


def _is_empty(folder: os.DirEntry[str]) -> bool:
    with os.scandir(folder) as entries:  # a large class is not listed twice
        return next(entries, None) is None


def _warn_of_joined(class_of: dict[str, str], root: Path) -> None:
    """Warn where folders of one name, and so of one class, are in several folders. class_of: class by folder."""
    folders_of: dict[str, list[str]] = {}
    for folder, name in sorted(class_of.items()):
        folders_of.setdefault(name, []).append(folder)
    joined = next((folders for folders in folders_of.values() if len(folders) > 1), None)
    if joined is not None:
        warnings.warn(
            f"classes are the innermost folders under {root}: {listed(joined)} are one class, "
            f"{class_of[joined[0]]!r}. Where the outer folders are the classes, move their images up.",
            stacklevel=3,
        )


def check_zips(root: Path) -> None:
    """Raise `InputError` for zip files of images without metadata: `datasets` reads no classes from their folders."""
    for path in files_below(root):
        if not path.lower().endswith(".zip"):
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is not a whole zip file: {first_line(error)}") from error
        image = next(filter(is_image, names), None)
        if image is not None and not any(name.rpartition("/")[2] in _METADATA for name in names):
            raise InputError(
                f"{path} holds images, such as {image}, whose classes are not read from a zip file: unpack it, to "
                "train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg alone"
            )


def files_as_dataset(paths: Any, labels: np.ndarray | None = None, names: list[str] | None = None) -> Dataset:
    """Image files as a data set with the column "image", and "label" if given; none is opened.

    paths: strings, or an array of pyarrow; labels: int64 [N], their classes; names: of the classes.
    """
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image

    try:
        paths = pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise not_utf8(error.object) from error
    stored = [pa.nulls(len(paths), pa.binary()), paths]
    columns: dict[str, Any] = {"image": pa.StructArray.from_arrays(stored, ["bytes", "path"], mask=paths.is_null())}
    features = Features(image=Image())
    if labels is not None:
        columns["label"], features["label"] = pa.array(labels), ClassLabel(names=names)
    # by default, `datasets` hashes a copy of the table
    buffers = [buffer for column in columns.values() for buffer in column.buffers() if buffer]
    fingerprint = hashlib.sha256(b"".join(buffers)).hexdigest()[:16]
    return Dataset(pa.table(columns), info=DatasetInfo(features=features), fingerprint=fingerprint)


def not_utf8(path: str) -> InputError:
    """The error for a path whose bytes are no UTF-8, as of files unpacked with names of another encoding."""
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return InputError(f"the name of {shown} is not UTF-8: rename it (convmv does so for all below a folder)")


def files_below(folder: str | Path) -> Iterator[str]:
    """Paths of the files in a folder and below, in the order of their paths.

    Without hidden files, pipes and devices, and without run folders, whose plots are no data.
    """
    with os.scandir(folder) as entries:
        kept = (entry for entry in entries if not (_is_hidden(entry) or _is_special(entry) or _leads_back(entry)))
        names = sorted(map(_marked, kept))
    if _RUN.issubset(names):
        return
    for name in names:
        path = f"{folder}/{name}"
        if name.endswith("/"):
            yield from files_below(path[:-1])
        else:
            yield path


def is_image(name: str) -> bool:
    """True for a name with the extension of a format that Pillow decodes by itself."""
    return os.path.splitext(name)[1].lower() in _image_extensions()


@cache
def _image_extensions() -> frozenset[str]:
    from PIL import Image

    kinds = Image.registered_extensions().items()
    return frozenset(ext for ext, kind in kinds if kind in Image.OPEN and kind not in _NOT_DECODED)


def _marked(entry: os.DirEntry[str]) -> str:
    """The name, ending in / for a folder or a link to one; a link that leads nowhere is a file."""
    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
    return entry.name + "/" if is_folder else entry.name


def _leads_back(entry: os.DirEntry[str] | Path) -> bool:
    """True for a link to a folder that it is in, by itself or through other links of its path."""
    if not entry.is_symlink() or not os.path.isdir(entry):
        return False
    target = Path(entry).resolve()
    return any(folder.resolve().is_relative_to(target) for folder in Path(entry).parents)


def _is_special(entry: os.DirEntry[str]) -> bool:
    """True for pipes, sockets and devices, which may be read without end, and links to them."""
    if entry.is_file(follow_symlinks=False):
        return False
    return os.path.exists(entry) and not os.path.isfile(entry) and not os.path.isdir(entry)


def _is_hidden(entry: os.DirEntry[str] | Path) -> bool:
    """True for what `datasets` skips: hidden files, hidden folders and those such as __MACOSX."""
    return entry.name.startswith(".") or (entry.name.startswith("__") and entry.is_dir())


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not _is_hidden(path) and not _leads_back(path)
