"""Files of weights that state the SHA-256 of their tensors, by which a damaged one is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..files import sync


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors that state their SHA-256, and read them back; equal tensors give equal bytes."""
    safetensors.torch.save_file(tensors, path, {"format": "pt", "sha256": weights_sha256(tensors)})
    _sort_metadata(path)
    sync(path)  # before the check, so that a disk that takes it only in part is found
    try:
        check_weights(path)
    except InputError as error:
        raise OSError(str(error)) from error


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in place; safetensors writes them in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(size))


def check_weights(path: Path) -> None:
    """InputError for safetensors that cannot be read, or do not have the SHA-256 that they state, if they state one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("sha256")
            tensors = {} if stated is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"{path} is missing or damaged ({reason}): copy it anew, or train again.") from error
    if stated is not None and weights_sha256(tensors) != stated:
        raise InputError(
            f"{path} is damaged: its tensors do not have the SHA-256 that it states; copy it anew, or train again."
        )
