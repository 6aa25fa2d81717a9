"""Image files by path, folder, glob or list, decoded in batches."""

from __future__ import annotations

import os
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.augment.images import open_image, upright
from ..data.folders import files_below, is_image
from ..errors import InputError, first_line

Batch = tuple[Tensor | None, list[str | None]]


def find_images(names: Iterable[str]) -> list[str]:
    """Paths of the images that names stand for, in order, repeated names repeated.

    A name is a file, a folder (its images at any depth, sorted, hidden ones left out), a glob pattern if nothing has
    this name, or `-` for names of files and folders on standard input, one a line or separated by NUL. A name without
    an image stands for itself, as a path that cannot be read. InputError if there are no names, or for a folder that
    cannot be read.
    """
    paths: list[str] = []
    for name in names:
        if name == "-":
            data = sys.stdin.buffer.read().removeprefix(BOM_UTF8)
            if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                raise InputError("images: standard input is UTF-16 text, as PowerShell writes: pass UTF-8.")
            listed = data.split(b"\0") if b"\0" in data else data.splitlines()
            try:
                names_read = [os.fsdecode(line) for line in listed if line]
            except UnicodeDecodeError as error:  # of a code page of Windows; elsewhere names are any bytes
                raise InputError(f"images: standard input is not UTF-8 text ({error.object!r}): pass UTF-8.") from error
            paths += [path for read in names_read for path in _images_of(read)]
        elif not name:
            raise InputError("images: an empty name; expected files, folders or patterns.")
        elif os.path.exists(name):
            paths += _images_of(name)
        else:
            paths += [path for match in _matches(name) for path in _images_of(match)] or [name]
    if not paths:
        raise InputError("no images: expected files, folders or patterns, or paths on standard input for -.")
    return paths


def _images_of(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    try:
        return [file for file in files_below(path) if is_image(file)] or [path]
    except OSError as error:  # no row of its own: the images after it would be missing without a word
        raise InputError(
            f"images: the folder {error.filename!r} cannot be read ({error.strerror}): make it readable, or name the "
            "other folders and files."
        ) from error


def _matches(pattern: str) -> list[str]:
    """Sorted matches of a pattern; folders that exist are taken literally, brackets in their names included."""
    path = Path(pattern)
    folder = next((parent for parent in path.parents if os.path.exists(parent)), None)
    if folder is None:  # of a drive that is not there
        return []
    return sorted(glob(str(escape(str(folder)) / path.relative_to(folder)), recursive=True))


class ImageFiles(Dataset):
    """Image files, decoded and transformed on access.

    Item i is the transformed image, or the reason why it cannot be read. grey: for networks of one channel.
    """

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], Tensor], grey: bool = False) -> None:
        self.paths, self.transform, self.grey = paths, transform, grey

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor | str:
        path = self.paths[i]
        try:
            if os.path.isdir(path):
                return "a folder without images"
            with open_image(path) as image:
                image = upright(image)
            return self.transform(image.convert("L") if self.grey else image)
        except Exception as error:  # decoders have no common error: OSError, ValueError, SyntaxError, struct.error, ...
            return first_line(error)

    def batches(self, batch_size: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
        """Batches in order: the readable images [b, C, H, W], None if b = 0, and for each path its error or None."""
        loader = DataLoader(
            self,
            batch_size,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own: DataLoader draws a base seed from the global one
        )
        yield from loader


def _collate(items: list[Any]) -> Batch:
    images = [item for item in items if isinstance(item, Tensor)]
    errors = [item if isinstance(item, str) else None for item in items]
    return torch.stack(images) if images else None, errors
