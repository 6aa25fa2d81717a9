"""Annotation lists: real excerpts and bad ones, their images as files and as rows, none decoded for splitting."""

import ntpath
import os
from pathlib import PureWindowsPath

import datasets
import numpy as np
import pytest
from listed import CLASSES, LISTS, jpeg, known_lists, shade, write_images, write_lists, write_rows

from ride_timm.data.datasets import SplitFacts
from ride_timm.data.lists import NameKeys, check_classes, listed_files, read_list, rows_of
from ride_timm.data.load import hold_out, load_longtail
from ride_timm.errors import InputError, RunError

SMALL = dict(train=SplitFacts(13, 7, 2), val=SplitFacts(6, 2, 2), test=SplitFacts(9, 3, 3))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    known_lists(monkeypatch, "imagenet_lt", SMALL)


def written(tmp_path, text: str):
    path = tmp_path / "list_train.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "files", "labels"),
    [
        ("train/n01440764/n01440764_3129.JPEG 0\n", ["train/n01440764/n01440764_3129.JPEG"], [0]),
        (
            "train_val2018/Plantae/7291/9f8e.jpg 7291\r\ntrain_val2018/Aves/3178/9622.jpg 3178\r\n",
            ["train_val2018/Plantae/7291/9f8e.jpg", "train_val2018/Aves/3178/9622.jpg"],
            [7291, 3178],
        ),
        ("\ufeffa b/my photo.jpg\t1\n\n\n", ["a b/my photo.jpg"], [1]),
    ],
)
def test_lists_are_read(tmp_path, text, files, labels):
    read = read_list(written(tmp_path, text))
    assert read.files == files and read.labels.tolist() == labels and read.labels.dtype == np.int64


def test_paths_of_windows(tmp_path, monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(os, "sep", ntpath.sep)
        read = read_list(written(tmp_path, "train\\ants\\1.jpg 0\nD:\\bees\\2.jpg 1\n"))
        windows.setattr(os.path, "isabs", ntpath.isabs)
        images = listed_files(read, PureWindowsPath("C:/set"))
    assert read.files == ["train/ants/1.jpg", "D:/bees/2.jpg"] and read.class_names(2) == ("ants", "bees")
    paths = [image["path"] for image in images.cast_column("image", datasets.Image(decode=False))["image"]]
    assert paths == ["C:\\set/train/ants/1.jpg", "D:/bees/2.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\nc.jpg 1\n", r"list_train.txt: line 2 has no label: 'b.jpg'"),
        ("a.jpg 0\nb.jpg one\n", r"line 2 has the label 'one', not a class number; expected `path label`"),
        ("a.jpg -1\n", "line 1 has the label '-1'"),
        ("a.jpg 1.0\n", "line 1 has the label '1.0'"),
        ("a.jpg ²\n", "line 1 has the label '²'"),
        ("a.jpg 99999999999999999999\n", "line 1 has the label '9999"),
        ("a.jpg 0\n\nb.jpg 1\n", "line 2 is blank"),
        (" 3\n", "line 1 has no label: '3'"),
        ("\n\n", "is empty: expected a line `path label`"),
        (b"a\xff.jpg 0\n", "list_train.txt cannot be read: .*utf-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        read_list(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_labels_with_gaps_or_beyond_the_classes_are_named(tmp_path):
    gaps = read_list(written(tmp_path, "a 0\nb 5\nc 2\n"))
    with pytest.raises(InputError, match=r"3 of 6 classes have no image: 1, 3, 4; .*highest label, 5, is in line 2"):
        check_classes(gaps)
    with pytest.raises(InputError, match=r"line 2 has the label 5, outside 0 … 2"):
        check_classes(gaps, 3)
    with pytest.raises(InputError, match="1 of 3 classes have no image: 1"):
        check_classes(read_list(written(tmp_path, "a 0\nc 2\n")), 3)


@pytest.mark.parametrize("inside", [False, True])
def test_the_authors_layout(tmp_path, monkeypatch, inside):
    """Lists next to the images, or both in the folder ImageNet_LT of the given root."""
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    write_lists(write_images(tmp_path / "ImageNet_LT"))
    data = load_longtail("imagenet_lt", tmp_path if inside else tmp_path / "ImageNet_LT")
    assert data.class_counts == [7, 4, 2] and data.class_names == CLASSES and data.val is None
    assert np.bincount(data.test.labels).tolist() == [3, 3, 3] and data.test.split == "test"
    assert load_longtail("imagenet_lt", tmp_path, use_val=True).val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for part, split in ((data.train, "train"), (data.test, "test")):
        for i, line in enumerate(LISTS[split]):
            image, label = part[i]
            assert label == int(line.split()[1]) and abs(image.getpixel((3, 3))[0] - shade(line.split()[0])) <= 2
    rest, held = hold_out(data.train, 0.3, 0)
    assert len(rest) + len(held) == 13 and held[0][0].size == (40, 32)


def test_lists_elsewhere_and_lists_of_ones_own(tmp_path):
    root, lists = write_images(tmp_path / "images"), write_lists(tmp_path / "lists")
    assert load_longtail("imagenet_lt", root, annotations=lists).class_counts == [7, 4, 2]
    mine = write_lists(tmp_path / "mine", "birds")
    data = load_longtail("birds", root, annotations=mine, imb_type="exp", imb_factor=0.5)
    assert data.class_counts == [4, 3, 2] and data.name == "birds"
    assert load_longtail("birds", root, annotations=mine, imb_type="none").class_counts == [7, 4, 2]


def test_a_set_without_a_test_list_is_tested_on_its_validation_list(tmp_path, monkeypatch):
    known_lists(monkeypatch, "inat18")
    lists = {split: LISTS[split] for split in ("train", "val")}
    write_lists(write_images(tmp_path), "iNaturalist18", lists)
    data = load_longtail("inat18", tmp_path)
    assert data.test.split == "val" and len(data.test) == 6
    with pytest.raises(InputError, match=r"no validation split besides 'train' and 'val'.*--holdout"):
        load_longtail("inat18", tmp_path, use_val=True)


def test_missing_images_are_found_first_or_named_by_their_line(tmp_path):
    root = write_lists(write_images(tmp_path))
    (root / LISTS["train"][1].split()[0]).unlink()
    data = load_longtail("imagenet_lt", root)
    with pytest.raises(RunError, match=r"image of line 2 of .*ImageNet_LT_train.txt cannot be read .*No such file"):
        data.train[1]
    with pytest.raises(RunError, match="line 2 of"):
        data.train.select([5, 1])[1]
    (root / LISTS["test"][3].split()[0]).unlink()
    with pytest.raises(InputError, match=r"ImageNet_LT_test.txt: the image of line 4 is missing, .*00000010.JPEG"):
        load_longtail("imagenet_lt", root)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ("imagenet_lt", {}, "no lists of imagenet_lt: pass --annotations DIR with ImageNet_LT_train.txt"),
        ("imagenet_lt", dict(data_dir="nowhere"), "'nowhere' does not exist"),
        ("imagenet_lt", dict(data_dir="."), r"no ImageNet_LT_train.txt in .* or .*ImageNet_LT"),
        ("mine", dict(annotations="."), r"no list \*train.txt"),
        ("mine", dict(annotations="two"), "several train lists, a_train.txt, b_train.txt"),
        ("places_lt", dict(annotations="one"), "no test list of places_lt next to .*Places_LT_train.txt"),
        ("mine", dict(annotations="good"), "no images of 'mine'"),
        ("places_lt", dict(annotations="places"), "not on the Hub: pass their root as --data-dir"),
        ("mine", dict(annotations="good", data_dir="gone"), "folder 'gone' does not exist"),
        ("mine", dict(annotations="unseen", data_dir="."), "unseen_test.txt has classes without a training image: 7"),
        ("fashion_lt", dict(annotations="good"), "is embedded in the package"),
        ("imagenet_lt", dict(data_dir=".", imb_type="exp", imb_factor=0.1), "long-tailed already"),
        ("mine", dict(annotations="good", data_dir=".", streaming=True), "streaming is for rows"),
        ("fashion_lt", dict(streaming=True), "streaming needs annotation lists"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, dataset, settings, message):
    monkeypatch.chdir(tmp_path)
    known_lists(monkeypatch, "places_lt")
    for name in ("a", "b"):
        write_lists(tmp_path / "two", name)
    write_lists(tmp_path / "one", "Places_LT", {"train": LISTS["train"]})
    write_lists(tmp_path / "good", "x")
    write_lists(tmp_path / "places", "Places_LT")
    write_lists(tmp_path / "unseen", "unseen", LISTS | {"test": ["a.jpg 7"]})
    with pytest.raises(InputError, match=message) as error:
        load_longtail(dataset, **{"imb_type": "none", **settings})
    assert "\n" not in str(error.value)


# rows of a Hub data set


def test_names_that_no_file_system_or_column_takes(tmp_path):
    (tmp_path / "train.txt").write_text(f"{'x' * 300}.jpg 0\n")
    with pytest.raises(InputError, match=r"train\.txt: the image of line 1 is missing"):
        load_longtail("mine", tmp_path, annotations=tmp_path)
    with pytest.raises(InputError, match=r"the name of /photos/\\xff is not UTF-8: rename it"):
        listed_files(read_list(tmp_path / "train.txt"), os.fsdecode(b"/photos/\xff"))


def test_rows_are_matched_by_file_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    lists = write_lists(tmp_path / "lists")
    data = load_longtail("imagenet_lt", write_rows(tmp_path / "hub"), annotations=lists, use_val=True)
    assert (data.train.split, data.val.split, data.test.split) == ("train", "train", "validation")
    for part, split in ((data.train, "train"), (data.val, "val"), (data.test, "test")):
        assert len(part) == len(LISTS[split])
        for i, line in enumerate(LISTS[split]):
            image, label = part[i]
            assert label == int(line.split()[1]) and abs(image.getpixel((3, 3))[0] - shade(line.split()[0])) <= 2


def test_without_a_root_the_images_are_the_hubs(tmp_path, monkeypatch):
    lists, rows = write_lists(tmp_path / "lists"), datasets.load_dataset(str(write_rows(tmp_path / "hub")))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"ILSVRC/imagenet-1k": rows}[name])
    assert load_longtail("imagenet_lt", annotations=lists).class_counts == [7, 4, 2]
    lists = write_lists(tmp_path / "mine", "mine")
    assert load_longtail("ILSVRC/imagenet-1k", annotations=lists, imb_type="none").class_counts == [7, 4, 2]


def test_rows_that_are_missing_are_named(tmp_path):
    lists = write_lists(tmp_path / "lists", lists=LISTS | {"train": [*LISTS["train"], "train/n01440764/other.JPEG 0"]})
    with pytest.raises(InputError, match=r"train.txt: 1 of 14 images have no row .* line 14: train/.*/other.JPEG"):
        load_longtail("imagenet_lt", write_rows(tmp_path / "hub"), annotations=lists)


def test_as_much_of_a_path_counts_as_tells_files_apart():
    keys = NameKeys(["train/airfield/00004851.jpg", "train/zen_garden/00004851.jpg"])
    assert keys.keys == ["airfield/00004851", "zen_garden/00004851"] and keys("x/y/zen_garden/1.png") == "zen_garden/1"
    keys = NameKeys(["train/n01440764/n01440764_3129.JPEG", "val/n01440764/ILSVRC2012_val_00029930.JPEG"])
    assert keys("n01440764_3129_n01440764.JPEG") == keys.keys[0] == "n01440764_3129"
    assert keys("ILSVRC2012_val_00029930_n01440764.JPEG") == keys.keys[1]


def named(*paths):
    """Rows that carry these paths, each with a grey of its own."""
    images = [path and {"bytes": jpeg(path), "path": path} for path in paths]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))


def matched(tmp_path, files, paths):
    """The paths of the rows that these listed files are found in."""
    annotations = read_list(written(tmp_path, "".join(f"{file} 0\n" for file in files)))
    return [paths[row] for row in rows_of(annotations, named(*paths), "image", "train")]


@pytest.mark.parametrize(
    ("files", "paths", "expected"),
    [
        # every class numbers its own images, and the list holds so few that their names alone differ
        (["train/dog/1.png"], ["train/cat/1.png", "train/dog/1.png", "train/fox/1.png"], [1]),
        (["dog/1.png", "fox/2.png"], ["a/b/fox/2.jpg", "a/b/dog/1.jpg", "a/b/dog/2.jpg", "a/b/fox/1.jpg"], [1, 0]),
        (["train/a/dog/1.png"], ["train/a/dog/1.png", "train/b/dog/1.png", None], [0]),
        (["dog/1.jpg", "dog/1.png"], ["dog/1.png", "cat/1.png", "dog/1.jpg"], [2, 0]),
        # an image that is listed twice is one image
        (["train/dog/1.png", "train/dog/1.png"], ["1.png", "2.png", "2.png"], [0, 0]),
    ],
)
def test_rows_of_the_same_name_are_separated_by_their_folders(tmp_path, files, paths, expected):
    assert matched(tmp_path, files, paths) == [paths[row] for row in expected]


@pytest.mark.parametrize(
    ("files", "paths", "message"),
    [
        (["c/2.png", "dog/1.png"], ["dog/1.png", "c/2.png", "dog/1.png"], "row 0 of .* dog/1.png, or row 2, dog/1.png"),
        (["c/2.png", "dog/1.png"], ["1.png", "2.png", "1.png"], "row 0 of split 'train', 1.png, or row 2, 1.png"),
        (["c/2.png", "dog/1.png"], ["x/dog/1.png", "c/2.png", "y/dog/1.png"], "row 0 .* x/dog/1.png, or row 2, y/dog"),
        (["train/c/2.png", "train/dog/1.png"], ["x/dog/1.png", "c/2.png", "y/dog/1.png"], "row 0 .*, or row 2, y/dog"),
    ],
)
def test_rows_that_cannot_be_separated_are_named(tmp_path, files, paths, message):
    with pytest.raises(InputError, match=rf"list_train.txt: line 2, {files[1]}, may be {message}.*: expected one row"):
        matched(tmp_path, files, paths)


def test_rows_without_the_folders_that_the_list_needs_are_not_taken_for_both(tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 images have no row of that name .* line 1: cat/1.png"):
        matched(tmp_path, ["cat/1.png", "dog/1.png"], ["1.png"])
