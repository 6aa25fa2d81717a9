"""Atomic writes: a reader sees the old file or the new one, complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import safetensors

from .errors import RunError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: a reader sees the old file or the new one, whole.

    RunError where the disk does not take it; the old file then still stands.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors wrap a full disk
        message = f"{path} could not be written, is the disk full? What stood there before still does. ({error})"
        raise RunError(message) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
