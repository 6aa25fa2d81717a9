"""Fixtures of training."""

import subprocess

import pytest


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)
