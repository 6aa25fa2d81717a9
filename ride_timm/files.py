"""Atomic writes: a reader sees the old file or the new one, complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from .errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file beside `path` to fill, renamed to `path` where the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process
        partial.touch()
        mode = partial.stat().st_mode  # what umask and the folder give to new files
        yield partial
        partial.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a partial file beside `path`, then rename it to `path`.

    RunError where writing fails; the old file is then unchanged.
    """
    try:
        with replacing(path) as partial:
            write(partial)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors wrap a full disk
        message = f"{path} could not be written, is the disk full? An older file of this name is unchanged. ({error})"
        raise RunError(message) from error


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
