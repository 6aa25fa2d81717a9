"""Folders of images by class: the rows that `datasets` gives, in its order, without its time."""

import os
import shutil
import sys
import unicodedata

import datasets
import pytest
from small_splits import png

from ride_timm.data.folders import files_below, is_image, scan_classes, split_folders, split_of
from ride_timm.data.load import load_longtail
from ride_timm.errors import InputError, RunError


def write(root, *files, data=b"no image is opened"):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    return root


def rows(splits):
    """{split: (paths, labels, class names)}."""
    found = {}
    for name, part in splits.items():
        stored = part.cast_column("image", datasets.Image(decode=False))
        found[name] = ([row["path"] for row in stored["image"]], part["label"], part.features["label"].names)
    return found


TREES = {
    "classes": ["b/1.jpg", "b/0.JPEG", "a/x.png", "ü c/y.webp", "a/.hidden.png", "a/notes.txt", "README.md"],
    "order": ["cat-2/1.png", "cat/1.png", "cat 1/1.png", "Cat/10.png", "Cat/2.png"],
    "splits": ["train/b/1.jpg", "train/a/1.jpg", "test/a/0.jpg", "test/b/2.jpg", "val/a/3.jpg"],
    "words": ["training/a/1.gif", "training/b/1.gif", "eval/a/1.bmp", "eval/b/1.bmp"],
    "inner": ["photos/train/a/1.jpg", "photos/train/b/1.jpg", "photos/test/a/2.jpg", "photos/test/b/2.jpg"],
    "beside": ["images/train/a/1.jpg", "images/train/b/1.jpg", "images/val/a/2.jpg", "about/readme.txt"],
    "uniform depth": ["animals/cat/1.jpg", "animals/dog/1.jpg", "plants/oak/1.jpg", "plants/cat/2.jpg"],
    "unseen": ["train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"],
    "special": ["a/1.jpg", "b/1.jpg", "__MACOSX/a/1.jpg", ".cache/b/1.jpg", "a/__1.jpg"],
}


@pytest.mark.parametrize("tree", TREES)
def test_the_rows_are_those_of_the_builder(tmp_path, tree):
    root = write(tmp_path / "data", *TREES[tree])
    found = rows(scan_classes(root))
    assert found == rows(datasets.load_dataset(str(root)))
    assert all(paths for paths, _, _ in found.values())


@pytest.mark.parametrize("run", ["runs/a", "cat/runs/train", "runs"])
def test_run_folders_among_the_classes_are_skipped(tmp_path, run):
    files = [f"{run}/{name}" for name in ("recipe.yaml", "state.pt", "curves.png", "hub/1.png")]
    found = rows(scan_classes(write(tmp_path, "cat/1.jpg", "dog/1.jpg", *files)))
    assert found == {"train": ([f"{tmp_path}/cat/1.jpg", f"{tmp_path}/dog/1.jpg"], [0, 1], ["cat", "dog"])}


def test_a_name_is_one_class_in_both_forms_of_unicode(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/1.jpg", "train/tea/1.jpg", f"test/{decomposed}/1.jpg", "test/tea/1.jpg")
    found = rows(scan_classes(tmp_path))
    assert found["test"][0] == [f"{tmp_path}/test/{decomposed}/1.jpg", f"{tmp_path}/test/tea/1.jpg"]
    assert all(names == [composed, "tea"] and labels == [0, 1] for _, labels, names in found.values())


def test_empty_class_folders_are_a_warning(tmp_path):
    root = write(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/dog/1.jpg")
    (root / "train" / "mouse").mkdir()
    with pytest.warns(UserWarning, match="without a file are no classes: .*/train/mouse$"):
        assert rows(scan_classes(root))["train"][2] == ["cat", "dog"]


def test_inner_folders_of_one_name_are_one_class_with_a_warning(tmp_path):
    folders = ["cat/2020", "cat/2021", "dog/2020", "dog/2021"]
    root = write(tmp_path, *(f"train/{folder}/1.jpg" for folder in folders))
    with pytest.warns(UserWarning, match="cat/2020, dog/2020 are one class, '2020'. Where the outer folders are"):
        assert list(scan_classes(root)["train"]["label"]) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["Train/a/1.jpg", "Train/b/1.jpg", "Test/a/1.jpg"], {"train": [0, 1], "test": [0]}),
        (["TRAIN/a/1.jpg", "TRAIN/b/1.jpg", "Dev/b/1.jpg"], {"train": [0, 1], "validation": [1]}),
        (["a/1.jpg", "a/deep/er/2.jpg", "b/1.jpg"], {"train": [0, 0, 1]}),  # the topmost folder is the class
        (["train/1.jpg", "apple/1.jpg", "test/1.jpg"], {"train": [0, 1, 2]}),  # classes, as of CIFAR-100
        (["bus/1.jpg", "train station/1.jpg"], {"train": [0, 1]}),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"], {"train": [0, 1], "test": None}),
        (["a/1.avif", "b/1.jpg"], {"train": [0, 1]}),
    ],
)
def test_what_the_builder_does_not_read(tmp_path, files, expected):
    found = scan_classes(write(tmp_path, *files))
    labels = {name: part["label"] if "label" in part.column_names else None for name, part in found.items()}
    assert {name: labels[name] and list(labels[name]) for name in labels} == expected


@pytest.mark.parametrize(
    "files",
    [
        ["a/1.jpg", "b/1.jpg", "metadata.csv"],
        ["train/a/1.jpg", "train/metadata.jsonl"],
        ["a.zip"],
        ["train/0.parquet", "test/0.parquet"],
        [],
    ],
)
def test_other_forms_are_left_to_datasets(tmp_path, files):
    assert scan_classes(write(tmp_path, *files)) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/1.jpg", "test/2.jpg"],
            r"train/1.jpg is in no class folder: expected train/CLASS/\*.jpg",
        ),
        (["1.jpg"], r"/1.jpg is in no class folder"),
        (["a/1.jpg", "b/1.jpg", "2.jpg"], r"/2.jpg is in no class folder"),
        (["images/1.jpg", "images/2.jpg"], r"are of one class, 'images': expected a folder for each class"),
    ],
)
def test_other_layouts_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        load_longtail(str(write(tmp_path, *files)))


def test_files_that_no_format_reads_are_one_warning(tmp_path):
    files = ["train/a/1.jpg", "train/a/2.HEIC", "train/b/1.jpg", "test/a/x.heic", "test/a/1.jpg", "test/b/deep/notes"]
    root = write(tmp_path, *files, "README.md", "train/list.txt", "test/b/.hidden")
    with pytest.warns(UserWarning) as caught:
        load_longtail(str(root))
    assert len(caught) == 1
    expected = f"files in the class folders under {root} are not read, 3 in all: .heic (2), no extension (1); Pillow"
    assert str(caught[0].message).startswith(expected)


def test_a_test_folder_without_classes_is_refused(tmp_path):
    root = write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    with pytest.raises(InputError, match=r"split 'test' has no column 'label'.* --test-split"):
        load_longtail(str(root))
    assert load_longtail(str(root), test_split="validation").test.labels.tolist() == [0, 1]


def test_an_unreadable_file_is_named(tmp_path):
    root = write(tmp_path, "train/a/1.png", "test/a/1.png", "test/b/1.png", data=png())
    write(root, "train/b/1.png", data=png(size=(99, 99))[:-40])
    data = load_longtail(str(root))
    assert data.train[0][0].size == (4, 4)
    with pytest.raises(RunError, match=r"row 1 of split 'train'(,| cannot).*train/b/1\.png"):
        data.train[1]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = write(tmp_path / "data", "a/1.jpg", "a/deep/2.jpg", "b/1.jpg")
    write(tmp_path / "elsewhere", "3.jpg")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "back").symlink_to(root)
    assert [path[len(str(root)) + 1 :] for path in files_below(root)] == [
        "a/1.jpg",
        "a/deep/2.jpg",
        "b/1.jpg",
        "c/3.jpg",
    ]
    assert split_folders(root) == {}
    assert list(scan_classes(root)["train"]["label"]) == [0, 0, 1, 2]


def test_links_between_folders_are_not_followed_in_circles(tmp_path):
    names = "abc"
    root = write(tmp_path / "data", *(f"{name}/0.jpg" for name in names))
    for name in names:
        for other in names.replace(name, ""):
            (root / name / other).symlink_to(root / other)
    found = [path[len(str(root)) + 1 :] for path in files_below(root)]
    assert found[:5] == ["a/0.jpg", "a/b/0.jpg", "a/b/c/0.jpg", "a/c/0.jpg", "a/c/b/0.jpg"] and len(found) == 15
    bare = tmp_path / "bare"
    for name in names:
        (bare / name).mkdir(parents=True)
        for other in names.replace(name, ""):
            (bare / name / other).symlink_to(bare / other)
    assert split_folders(bare) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among files")
def test_pipes_are_left_out(tmp_path):
    root = write(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(root / "a" / "2.png")
    (root / "a" / "3.png").symlink_to("2.png")
    assert [path[len(str(root)) + 1 :] for path in files_below(root)] == ["a/1.png", "b/1.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 elsewhere")
@pytest.mark.parametrize("name", [b"train/a/\xe9.png", b"train/\xe9/1.png"])
def test_names_that_are_no_utf8_are_refused(tmp_path, name):
    root = write(tmp_path, "train/a/1.png", "train/b/1.png")
    path = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copy(root / "train/a/1.png", path)
    with pytest.raises(InputError, match=r"the name of /.*/train/.*\\xe9.*png is not UTF-8: rename it"):
        load_longtail(str(root))


def test_links_that_lead_nowhere_are_files(tmp_path):
    root = write(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", data=png())
    for name, target in {"train/a/self": "self", "train/a/gone": "nowhere", "train/b/2.png": "2.png"}.items():
        (root / name).symlink_to(target)
    with pytest.warns(UserWarning, match=r"are not read, 2 in all: no extension \(2\)"):
        data = load_longtail(str(root))
    assert data.class_counts == [1, 2]
    with pytest.raises(RunError, match=r"row 2 .* cannot be read \(OSError: .*symbolic links: .*2\.png"):
        data.train[2]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Train", "train"),
        ("my-training_2", "train"),
        ("VALID", "validation"),
        ("dev", "validation"),
        ("Eval", "test"),
        ("testing set", "test"),
        ("restest", None),
        ("contest", None),
        ("full", None),
        ("", None),
    ],
)
def test_names_of_splits(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jpg", True), ("a.JPEG", True), ("a.avif", True), ("a", False), ("a.mpg", False), ("a.eps", False)],
)
def test_names_of_images(name, expected):
    assert is_image(name) == expected
