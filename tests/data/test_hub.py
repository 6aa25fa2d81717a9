"""The splits of folders and of parquet files."""

import errno
import os
import zipfile
from itertools import count

import datasets
import pytest
from small_splits import png, split

from ride_timm.data import folders
from ride_timm.data.hub import read_local
from ride_timm.data.load import load_longtail
from ride_timm.errors import InputError


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


@pytest.mark.parametrize("form", ["images", "classes", "metadata", "parquet", "one file", "data/*.parquet", "saved"])
def test_a_path_may_hold_what_a_glob_reads(tmp_path, form):
    root = tmp_path / "a[1]*?" / "what? [b]"
    root.mkdir(parents=True)
    (tmp_path / "a[1]*?" / "what! [b]").mkdir()
    parts = {name: split(labels) for name, labels in dict(train=[0, 1, 0, 1, 1, 0], test=[1, 0]).items()}
    if form == "images":
        write_folders(root, "train", "test", classes=("[x]", "y*"))
    elif form == "classes":
        for name in "a?c":
            (root / name).mkdir()
            for i in range(3):
                (root / name / f"[{i}].png").write_bytes(png())
    elif form == "metadata":
        for part in ("train", "test"):
            write_folders(root, part)
            (root / part / "metadata.csv").write_text("file_name,label\nant/a.png,1\nbee/a.png,0\n")
    elif form == "saved":
        datasets.DatasetDict(parts).save_to_disk(root)
    else:
        for name, part in parts.items():
            path = root / ("data" if form == "data/*.parquet" else "") / f"{name}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            part.to_parquet(path)
    path = root / "train-00000-of-00001.parquet" if form == "one file" else root
    data = load_longtail(str(path))
    if form == "images":
        assert data.class_names == ("[x]", "y*") and data.test[0][0].getpixel((0, 0)) == (3, 3, 3)
    elif form == "classes":
        assert data.class_counts == [2, 2, 2] and data.test[2][0].size == (4, 4)
    elif form == "metadata":
        assert data.train.labels.tolist() == [1, 0] and data.test[1][0].getpixel((0, 0)) == (2, 2, 2)
    else:
        assert data.class_counts == ([2, 2] if form == "one file" else [3, 3])
        assert sorted(data.test.labels) == [0, 1] and (data.test_held_out is not None) == (form == "one file")


def test_shards_and_splits_of_other_names(tmp_path):
    root = tmp_path / "[x]"
    (root / "data").mkdir(parents=True)
    for i in range(2):
        split([i]).to_parquet(root / "data" / f"full-0000{i}-of-00002.parquet")
    assert list(read_local(root)["full"]["label"]) == [0, 1]
    for file in (root / "data").iterdir():
        file.rename(root / f"{file.stem[9]}.parquet")
    assert list(read_local(root)["train"]["label"]) == [0, 1]


CONFIGS = """---
configs:
- {config_name: large, data_files: [{split: train, path: large/train.parquet}, {split: test, path: large/test.parquet}]}
- {config_name: small, data_files: [{split: train, path: small/train.parquet}, {split: test, path: small/test.parquet}]}
---
"""


@pytest.fixture
def two_configs(tmp_path):
    for name, labels in dict(large=[0, 1, 0], small=[0, 1]).items():
        (tmp_path / "two" / name).mkdir(parents=True)
        for part in ("train", "test"):
            split(labels).to_parquet(tmp_path / "two" / name / f"{part}.parquet")
    (tmp_path / "two" / "README.md").write_text(CONFIGS)
    return tmp_path / "two"


@pytest.fixture
def served(two_configs, monkeypatch):
    """The Hub data set me/two, of two configurations; what its clients asked for."""
    asked, load_dataset = [], datasets.load_dataset

    def serve(hub_id, **how):
        assert hub_id == "me/two"
        asked.append(how)
        return load_dataset(str(two_configs), name=how.get("name"))

    monkeypatch.setattr(datasets, "load_dataset", serve)
    return asked


def test_a_configuration_and_a_revision_of_a_hub_set(served):
    data = load_longtail("me/two", dataset_config="large", dataset_revision="v1.0")
    assert data.class_counts == [2, 1] and served == [dict(name="large", revision="v1.0")]


@pytest.mark.parametrize("of_hub", [True, False])
@pytest.mark.parametrize(
    ("config", "message"), [(None, "has several configurations"), ("tiny", "has no configuration 'tiny'")]
)
def test_configurations_are_named(served, two_configs, monkeypatch, of_hub, config, message):
    if not of_hub:
        monkeypatch.undo()
    with pytest.raises(InputError, match=message + ": pass --dataset-config, one of large, small$"):
        load_longtail("me/two" if of_hub else str(two_configs), dataset_config=config)


def test_a_configuration_of_a_local_folder(two_configs):
    assert load_longtail(str(two_configs), dataset_config="small").class_counts == [1, 1]
    with pytest.raises(InputError, match=r"dataset_revision='v1': .* is local, not a Hub data set"):
        load_longtail(str(two_configs), dataset_revision="v1")
    with pytest.raises(InputError, match="has no card with configurations; leave it out"):
        load_longtail(str(two_configs / "small"), dataset_config="small")
    with pytest.raises(InputError, match="is embedded"):
        load_longtail("fashion_lt", dataset_config="small")


def test_a_loading_script_is_refused(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("raise SystemExit('never run')")
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load_dataset(str(tmp_path / "old" / "old.py")))
    with pytest.raises(InputError, match=r"by a script, old\.py, .* --dataset-revision refs/convert/parquet"):
        load_longtail("me/old")


def write_zip(path, names, more=()):
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(i))
        for name, text in more:
            archive.writestr(name, text)


@pytest.mark.parametrize(
    ("archive", "names"),
    [
        ("train.zip", ["a/0.png", "b/1.png"]),
        ("images.zip", ["train/a/0.png", "train/b/1.png", "test/a/2.png"]),
        ("a.ZIP", ["0.png"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_zip_files_of_class_folders_are_refused(tmp_path, archive, names, streaming):
    write_zip(tmp_path / archive, names)
    with pytest.raises(InputError, match=rf"{archive} holds images, such as {names[0]}, .*: unpack it, to train/CLASS"):
        read_local(tmp_path, streaming)


def test_zip_files_with_metadata_are_read(tmp_path):
    for part in ("train", "test"):
        csv = "file_name,label\n0.png,cat\n1.png,dog\n"
        write_zip(tmp_path / f"{part}.zip", ["0.png", "1.png"], [("metadata.csv", csv)])
    data = load_longtail(str(tmp_path))
    assert data.class_names == ("cat", "dog") and data.class_counts == [1, 1] and data.test.split == "test"
    assert data.test[1][0].getpixel((0, 0)) == (1, 1, 1)


def test_a_broken_zip_file_is_named(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"PK and no more")
    with pytest.raises(InputError, match=r"train\.zip is not a whole zip file: BadZipFile"):
        read_local(tmp_path)


def test_the_cause_is_told_where_datasets_tells_nothing(tmp_path):
    root = write_folders(tmp_path / "data", ".")
    (root / "metadata.csv").write_text("label\n0\n")
    with pytest.raises(InputError, match=r"cannot read a data set from .*: ValueError: `file_name`"):
        read_local(root)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    """Simulated, since root may read everything."""
    root, scandir = write_folders(tmp_path / "data", "."), os.scandir

    def deny(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", deny)
    with pytest.raises(InputError, match=r"cannot read '.*data': PermissionError: .*Permission denied: '.*/bee'"):
        load_longtail(str(root))


@pytest.mark.parametrize("arguments", [("x" * 300,), ("cifar10", "x" * 300)])
def test_a_path_that_no_file_system_takes(arguments):
    with pytest.raises(InputError, match=r"cannot read 'xxx.*': OSError: .*File name too long"):
        load_longtail(*arguments)


def test_a_card_that_is_not_utf8_is_named(tmp_path):
    root = write_folders(tmp_path / "data", ".")
    (root / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(InputError, match=r"data/README\.md' is not UTF-8 \(UnicodeDecodeError: .*\): save it as UTF-8"):
        load_longtail(str(root))


def test_the_error_is_all_that_is_told(tmp_path, caplog):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"cannot read a data set from .*: ArrowInvalid: "):
        read_local(tmp_path)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    split([0, 1], data=[png()] * 2).to_parquet(tmp_path / "data" / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(InputError, match=r"the cache of `datasets`, .*file.datasets, cannot be written \(.*HF_HOME$"):
        read_local(tmp_path / "data")
