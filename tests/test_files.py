"""Atomic writes."""

import errno
import os

import pytest
import safetensors.torch
import torch

from ride_timm import RunError
from ride_timm.files import write_atomically, write_text


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_follow_the_umask(tmp_path, umask):
    tensors = dict(weight=torch.zeros(2))
    write_atomically(tmp_path / "model.safetensors", lambda partial: safetensors.torch.save_file(tensors, partial))
    (tmp_path / ".results.json.partial").touch(0o600)  # left by a killed process
    write_text(tmp_path / "results.json", "{}")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def full_disk(partial):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"state.pt could not be written.*older file.*unchanged.*No space left"):
        write_atomically(path, full_disk)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["state.pt"]
