"""Folders of images: their splits by the names of top folders, their files in order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# the words by which `datasets` recognises the folder of a split, and the separators around them
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_BETWEEN_WORDS = r"[-._ 0-9]+"


def split_of(name: str) -> str | None:
    """The split that a name stands for in any case, such as Valid or test_set; None for other names."""
    words = set(re.split(_BETWEEN_WORDS, name.lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & known), None)


def split_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of each split under a root, by name; empty if its top folders are classes.

    They are classes if one has no name of a split, unless the training images are in folders of their own.
    """
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not _is_hidden(entry)]
    filled = [folder for folder in folders if split_of(folder.name) and next(files_below(folder), None)]
    by_split = {split: [folder for folder in filled if split_of(folder.name) == split] for split in SPLIT_WORDS}
    found = {split: named for split, named in by_split.items() if named}
    if all(split_of(folder.name) for folder in folders):
        return found
    by_class = [
        folder for folder in found.get("train", []) if not any(is_image(path.name) for path in folder.iterdir())
    ]
    return found if by_class else {}


def files_below(folder: str | Path) -> Iterator[str]:
    """Paths of the files in a folder and below, in the order of their paths; hidden ones are left out."""
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name + "/" if entry.is_dir() else entry.name
            for entry in entries
            if not _is_hidden(entry) and not (entry.is_symlink() and _leads_back(entry.path))
        )
    for name in names:
        path = f"{folder}/{name}"
        if name.endswith("/"):
            yield from files_below(path[:-1])
        else:
            yield path


def _is_hidden(entry: os.DirEntry[str] | Path) -> bool:
    """True for what `datasets` skips: hidden files, hidden folders and those such as __MACOSX."""
    return entry.name.startswith(".") or (entry.name.startswith("__") and entry.is_dir())


def is_image(name: str) -> bool:
    """True for a name with the extension of a format that Pillow reads."""
    return os.path.splitext(name)[1].lower() in _image_extensions()


@cache
def _image_extensions() -> frozenset[str]:
    from PIL import Image

    return frozenset(ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _leads_back(link: str) -> bool:
    """True for a link to a folder that it is in."""
    return Path(link).parent.resolve().is_relative_to(Path(link).resolve())
