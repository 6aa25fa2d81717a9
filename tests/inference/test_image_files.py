"""Image files: names that stand for them, and batches with errors."""

import io
import os

import pytest
import torch
from encoded_images import encoded, smooth
from PIL import Image
from torchvision.transforms.functional import to_tensor

from ride_timm import InputError
from ride_timm.inference.image_files import ImageFiles, find_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty files of an image folder; the working directory is that folder."""
    for name in (
        "b.png",
        "A.JPG",
        "notes.txt",
        ".hidden.png",
        "deep/er/c.webp",
        ".git/d.png",
        "x[1]/e.png",
        "x[1].png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (["."], ["./A.JPG", "./b.png", "./deep/er/c.webp", "./x[1].png", "./x[1]/e.png"]),
        (["deep", "b.png", "b.png"], ["deep/er/c.webp", "b.png", "b.png"]),
        (["*.png"], ["b.png", "x[1].png"]),
        (["**/*.webp"], ["deep/er/c.webp"]),
        (["x[1].png", "x[1]"], ["x[1].png", "x[1]/e.png"]),
        (["x[1]/*.png", "x[1]/?.png"], ["x[1]/e.png", "x[1]/e.png"]),
        (["notes.txt", "missing.png", "*.gif"], ["notes.txt", "missing.png", "*.gif"]),
        (["dee?"], ["deep/er/c.webp"]),
    ],
)
def test_names_stand_for_files(folder, names, paths):
    assert find_images(names) == paths


@pytest.mark.parametrize("data", [b"b.png\ndeep\r\n\n*.png", b"b.png\0deep\0*.png\0"])
def test_names_on_standard_input_are_no_patterns(folder, monkeypatch, data):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert find_images(["A.JPG", "-"]) == ["A.JPG", "b.png", "deep/er/c.webp", "*.png"]


@pytest.mark.parametrize(("encoding", "found"), [("utf-8-sig", ["é.png"]), ("utf-16", None)])
def test_standard_input_of_windows(folder, monkeypatch, encoding, found):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é.png\r\n".encode(encoding))))
    if found is None:
        with pytest.raises(InputError, match="standard input is UTF-16 text, as PowerShell writes: pass UTF-8"):
            find_images(["-"])
    else:
        assert find_images(["-"]) == found


def test_standard_input_in_a_code_page_of_windows(monkeypatch):
    monkeypatch.setattr("os.fsdecode", lambda name: name.decode())  # strict there
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("b.png\né.png\n".encode("cp1252"))))
    with pytest.raises(InputError, match=r"standard input is not UTF-8 text \(b'\\xe9.png'\): pass UTF-8"):
        find_images(["-"])


def test_no_names(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(InputError, match="no images: expected files, folders or patterns"):
        find_images(["-"])


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").touch()
    os.symlink(tmp_path, tmp_path / "a" / "up")
    os.symlink(tmp_path / "a", tmp_path / "c")
    assert find_images([str(tmp_path)]) == [str(tmp_path / "a" / "b.png"), str(tmp_path / "c" / "b.png")]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_the_order_and_the_errors(tmp_path, workers):
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    images = [smooth(8 + i, 8).crop((0, 0, 8, 8)) for i in range(5)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    for i in (1, 2, 3):
        (tmp_path / f"{i}.png").write_bytes(encoded(images[i], "PNG")[:60])
    state = torch.get_rng_state()
    batches = list(ImageFiles(paths, to_tensor).batches(2, workers, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), state)
    assert [None if pixels is None else len(pixels) for pixels, _ in batches] == [1, None, 1]
    assert [[error is None for error in errors] for _, errors in batches] == [[True, False], [False, False], [True]]
    assert torch.equal(batches[2][0][0], to_tensor(images[4]))


@pytest.mark.parametrize("error", [ValueError("a"), SyntaxError("b"), MemoryError(), Image.DecompressionBombError("c")])
def test_whatever_a_decoder_raises_is_an_error_of_the_image(tmp_path, error):
    smooth(4, 4).save(tmp_path / "a.png")

    def fail(image):
        raise error

    assert ImageFiles([str(tmp_path / "a.png")], fail)[0].startswith(type(error).__name__)


def test_grey_images_for_networks_of_one_channel(tmp_path):
    smooth(4, 4).save(tmp_path / "a.png")
    grey = ImageFiles([str(tmp_path / "a.png")], to_tensor, grey=True)[0]
    assert torch.equal(grey, to_tensor(smooth(4, 4).convert("L")))


def test_a_name_longer_than_the_file_system_allows_stands_for_itself():
    for name in ("a" * 300, "a" * 300 + "/*.jpg"):
        assert find_images([name]) == [name]
        assert "too long" in ImageFiles([name], to_tensor)[0] or os.name == "nt"


def test_a_folder_that_cannot_be_read_is_refused(folder, monkeypatch):
    """As root reads every folder, the error is raised here."""
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "er":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("ride_timm.data.folders.os.scandir", refuse)
    with pytest.raises(InputError, match=r"the folder '\./deep/er' cannot be read \(Permission denied\)"):
        find_images(["."])


def test_an_empty_name_is_refused():
    with pytest.raises(InputError, match="an empty name"):
        find_images([""])
