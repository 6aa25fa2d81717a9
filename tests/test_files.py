"""Atomic writes, and numbers by class."""

import errno
import os

import pytest
import safetensors.torch
import torch

from ride_timm import InputError, RunError
from ride_timm.files import new_folder, read_class_values, write_atomically, write_text


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


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_appears_when_it_is_complete_or_not_at_all(tmp_path, there):
    folder = tmp_path / "new" / "onnx"
    if there:
        folder.mkdir(parents=True)
    message = r"onnx could not be written .*No space left.*; nothing was left there"
    with pytest.raises(RunError, match=message), new_folder(folder) as partial:
        (partial / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list((tmp_path / "new").rglob("*")) == [folder] * there
    with new_folder(folder) as partial:
        (partial / "file").touch()
        assert not (folder / "file").exists()
    assert sorted((tmp_path / "new").rglob("*")) == [folder, folder / "file"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.csv", 'cat,1\n"newt, red",0.5\ndog,2e0\n'),
        ("w.csv", "class,weight\nnewt, red,0.5\ndog,2\ncat,1\n"),  # a heading; a comma in a name
        ("w.tsv", "dog\t2\n\ncat\t1\nnewt, red\t0.5\r\n"),
        ("w.txt", "\ufeff1\n2\n\n0.5"),
        ("w.json", '{"dog": 2, "newt, red": 0.5, "cat": 1}'),
        ("w.json", "[1, 2, 0.5]"),
    ],
)
def test_numbers_by_class(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_values(tmp_path / name, ("cat", "dog", "newt, red")) == [1, 2, 0.5]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.csv", "cat,1\ndog,-2\n", "w.csv, line 2: '-2' is not a finite number of at least 0"),
        ("w.csv", "cat,nan\ndog,2\n", "no number for 'cat'|line 1: 'nan' is not a finite number"),
        ("w.txt", "1\nmany\n", "line 2: 'many' is not a finite number"),
        ("w.csv", "cat,1\nbird,2\n", "line 2: the data have no class 'bird'; classes are 'cat', 'dog'"),
        ("w.csv", "cat,1\ncat,2\n", "line 2: class 'cat' is there twice"),
        ("w.csv", "cat,1\n", r"no number for 'dog' \(1 of 2 classes\)"),
        ("w.txt", "1\n2\n3\n", "w.txt has 3 numbers, expected one for each of 2 classes"),
        ("w.csv", "cat,1\n2\n", "some lines name no class; give one number a line, in class order"),
        ("w.json", '{"cat": true, "dog": 1}', "class 'cat': True is not a finite number"),
        ("w.json", '{"cat": 1, "cat": 1}', "class 'cat' is there twice"),
        ("w.json", "[1, null]", "number 2: None is not a finite number"),
        ("w.json", "3", "expected {name: number} or a list of numbers"),
        ("w.json", "{", "is not JSON"),
        ("w.json", "[" * 5000, "is not JSON"),
        ("w.json", "[" + "9" * 5000 + ", 1]", "is not JSON|is not a finite number"),
        ("w.csv", 'cat,"1' + "0" * 200_000, "line 1: field larger than field limit"),
        ("absent.csv", None, r"absent.csv cannot be read \(No such file"),
    ],
)
def test_unusable_numbers_by_class_name_their_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_values(tmp_path / name, ("cat", "dog"))


def test_classes_of_one_name_take_numbers_in_their_order(tmp_path):
    (tmp_path / "named.csv").write_text("cat,1\ncat,2\n")
    with pytest.raises(InputError, match="class names of the data are not unique; give one number a line"):
        read_class_values(tmp_path / "named.csv", ("cat", "cat"))
    (tmp_path / "plain.txt").write_text("1\n2\n")
    assert read_class_values(tmp_path / "plain.txt", ("cat", "cat")) == [1, 2]
