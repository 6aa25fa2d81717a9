"""The splits of folders and of parquet files."""

from itertools import count

import datasets
import pytest
from small_splits import png, split

from ride_timm.data.hub import read_local
from ride_timm.data.load import load_longtail


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_folders(root, *parts, classes=("ant", "bee")):
    """Images by class in folders of splits, each with a grey of its own."""
    shades = count(1)
    for part in parts:
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(png(next(shades), "L"))
    return root


CLASSES_LIKE_SPLITS = ("[x] y", "test", "train", "train station", "val-1", "ü train")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_may_be_called_like_a_split(tmp_path, streaming):
    """CIFAR-100 has a class "train": its test images must not come into the training set."""
    root = write_folders(tmp_path / "train test", "train", "val", "test", classes=CLASSES_LIKE_SPLITS)
    splits = read_local(root, streaming)
    assert list(splits) == ["train", "validation", "test"]
    found = [[row["image"].getpixel((0, 0)) for row in part] for part in splits.values()]
    assert [sorted(part) for part in found] == [list(range(1, 7)), list(range(7, 13)), list(range(13, 19))]
    assert all(part.features["label"].names == list(CLASSES_LIKE_SPLITS) for part in splits.values())


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["training", "testing"], ["train", "test"]),
        (["train", "test_set", "val2017"], ["train", "validation", "test"]),
        (["train", "valid", "eval [1]"], ["train", "validation", "test"]),
        (["train", "val", "extra", ".dev"], ["train", "validation"]),
    ],
)
def test_folders_of_splits_by_other_names(tmp_path, folders, expected):
    root = write_folders(tmp_path, *folders)
    (root / "evaluation").mkdir()  # an empty one is none
    splits = read_local(root)
    assert list(splits) == expected and {part.num_rows for part in splits.values()} == {2}


@pytest.mark.parametrize("inside", ["train", "data"])
def test_folders_of_parquet_files(tmp_path, inside):
    for name, labels in (("train", [0, 1, 0]), ("test", [1, 0])):
        file = tmp_path / (f"{name}/0.parquet" if inside == "train" else f"data/{name}-00000-of-00001.parquet")
        file.parent.mkdir(exist_ok=True)
        split(labels).to_parquet(file)
    if inside == "data":
        write_folders(tmp_path, "train")  # folders next to the rows are ignored
    assert load_longtail(str(tmp_path), imb_type="none").class_counts == [2, 1]


def test_metadata_and_cards_of_image_folders_are_kept(tmp_path):
    for part in ("train", "test"):
        for i in range(2):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / f"{i}.png").write_bytes(png())
        (tmp_path / part / "metadata.csv").write_text("file_name,label\n0.png,1\n1.png,0\n")
    data = load_longtail(str(tmp_path), imb_type="none")
    assert data.train.labels.tolist() == [1, 0] and data.test.split == "test"
    root = write_folders(tmp_path / "card", "train", "other")
    files = "".join(
        f"  - {{split: {name}, path: {path}/**}}\n" for name, path in dict(train="other", test="train").items()
    )
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    assert read_local(root)["test"][0]["image"].getpixel((0, 0)) == 1
