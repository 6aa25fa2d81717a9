"""Weights that state their SHA-256."""

import hashlib

import pytest
import safetensors.torch
import torch

from ride_timm.errors import InputError, RunError
from ride_timm.files import write_atomically
from ride_timm.models.weights_file import check_weights, weights_sha256, write_weights

TENSORS = {"é": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "steps": torch.tensor(3)}


def flip_a_bit(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_hash_is_over_names_and_bytes_in_the_order_of_the_names():
    tensors = dict(b=torch.tensor([1, 2], dtype=torch.uint8), a=torch.tensor(3, dtype=torch.uint8))
    assert weights_sha256(tensors) == hashlib.sha256(b"a\x03b\x01\x02").hexdigest()


def test_equal_tensors_give_equal_bytes_that_others_read(tmp_path):
    found = set()
    for i in range(8):  # safetensors orders its metadata at random
        write_weights(TENSORS, tmp_path / str(i))
        found.add((tmp_path / str(i)).read_bytes())
    assert len(found) == 1
    check_weights(tmp_path / "0")
    loaded = safetensors.torch.load_file(tmp_path / "0")
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == dict(format="pt", sha256=weights_sha256(TENSORS))


@pytest.mark.parametrize("at", [0, 12, -1])
def test_a_flipped_bit_is_refused(tmp_path, at):
    path = tmp_path / "model.safetensors"
    write_weights(TENSORS, path)
    flip_a_bit(path, at)
    with pytest.raises(InputError, match=r"model\.safetensors is .*damaged.* copy it anew, or train again\.$"):
        check_weights(path)


def test_weights_of_others_state_no_hash(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x", {"format": "pt"})
    flip_a_bit(tmp_path / "x", -1)
    check_weights(tmp_path / "x")


def test_weights_that_read_back_otherwise_do_not_replace_the_last(tmp_path, monkeypatch):
    path, save = tmp_path / "model.safetensors", safetensors.torch.save_file
    path.write_text("the last")

    def damaged(tensors, partial, metadata):
        save(tensors, partial, metadata)
        flip_a_bit(partial, -1)

    monkeypatch.setattr(safetensors.torch, "save_file", damaged)
    with pytest.raises(RunError, match=r"could not be written.*do not have the SHA-256"):
        write_atomically(path, lambda partial: write_weights(TENSORS, partial))
    assert path.read_text() == "the last"
