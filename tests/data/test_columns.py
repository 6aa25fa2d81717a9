"""Columns of images and labels, as data sets of one's own have them: read, or refused with the way out."""

import datasets
import fsspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from datasets import ClassLabel, Dataset, Value
from pyarrow import parquet
from small_splits import png, saved, split

from ride_timm.data.load import load_longtail
from ride_timm.errors import InputError, RunError

HALF_FLOATS = pytest.mark.skipif(int(pa.__version__.partition(".")[0]) < 16, reason="pyarrow 15 casts none")


def test_columns_can_be_named(tmp_path):
    def two(labels):
        extra = split(labels).rename_columns({"image": "photo", "label": "kind"})
        return datasets.concatenate_datasets([extra, split([0] * len(labels))], axis=1)

    path = saved(tmp_path, train=two([0, 1]), test=two([1, 0]))
    assert load_longtail(path, imb_type="none", label_column="kind").class_counts == [1, 1]
    data = load_longtail(path, imb_type="none", image_column="photo")
    assert data.train.image_column == "photo" and data.class_counts == [2]


def test_no_usable_column_is_refused(tmp_path):
    plain = Dataset.from_dict({"path": ["a"], "label": [0]})
    with pytest.raises(InputError, match=r"no image column: it has path \(string\), label \(int64\), and the first"):
        load_longtail(saved(tmp_path, train=plain, test=plain), imb_type="none")
    other = split([0], label="kind")
    with pytest.raises(InputError, match="no label column fine_label or label or labels; it has image, kind"):
        load_longtail(saved(tmp_path / "2", train=other, test=other), imb_type="none")
    with pytest.raises(InputError, match="split 'test' has no column 'label'; it has image, kind"):
        load_longtail(saved(tmp_path / "3", train=split([0]), test=other), imb_type="none")


TWO = ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    "train, feature, message",
    [
        ([0.0, 1.5], Value("float32"), r"holds 1\.5 in row 1, not a class"),
        ([0.0, 1e300], Value("float64"), r"holds 1e\+300 in row 1, not a class"),
        ([0.0, float("nan")], Value("float64"), "holds nan in row 1, not a class"),
        ([[0], [1]], [Value("int64")], r"lists of labels, .* by --label-column, or list .*--annotations"),
        ([b"a", b"b"], Value("binary"), "holds binary, not classes: .* --label-column"),
        (["a", None], Value("string"), r"no value in row 1 .* --label-column"),
        ([0, None, 1], Value("int64"), r"no value in row 1 \(1 rows in all\)"),
        ([0, None, 1], TWO, "no value in row 1"),
        ([None, None], Value("null"), r"no value in row 0 \(2 rows in all\)"),
        ([0, -1, 1], Value("int64"), "label -1 in row 1 of split 'train', column 'label', is outside 0, 1, 2"),
        ([0, 1, -1], TWO, "label -1 in row 2 .* outside 0 … 1"),
        ([-1, -1], TWO, "split 'train' is unlabelled"),
    ],
)
def test_hostile_training_labels_are_refused(tmp_path, train, feature, message):
    path = saved(
        tmp_path, train=split(train, feature=feature), test=split([0], feature=feature if feature == TWO else None)
    )
    with pytest.raises(InputError, match=message):
        load_longtail(path, imb_type="none")


@pytest.mark.parametrize(
    ("train", "test", "feature", "names", "expected"),
    [
        (["dog", "cat", "dog", "Ant"], ["cat", "dog"], "string", ("Ant", "cat", "dog"), [2, 1, 2, 0]),
        (["10", "9", "10"], ["9", "10"], "large_string", ("10", "9"), [0, 1, 0]),
        ([True, False, True], [False, True], "bool", ("false", "true"), [1, 0, 1]),
        ([2.0, 0.0, 1.0], [1.0, 2.0], "float32", ("0", "1", "2"), [2, 0, 1]),
        ([1.0, 0.0], [1.0, 0.0], "float64", ("0", "1"), [1, 0]),
        ([3, 1, 2], [1, 3], "int64", ("1", "2", "3"), [2, 0, 1]),
        ([10, 9, 10], [9], "uint8", ("9", "10"), [1, 0, 1]),
        ([0, 10**9], [0], "int64", ("0", "1000000000"), [0, 1]),
        ([2.0, 4.0], [4.0], "float32", ("2", "4"), [0, 1]),
        pytest.param([2.0, 4.0], [4.0], "float16", ("2", "4"), [0, 1], marks=HALF_FLOATS),
    ],
)
@pytest.mark.filterwarnings("error")
def test_labels_of_other_kinds_become_classes(tmp_path, train, test, feature, names, expected):
    parts = {name: split(labels, feature=Value(feature)) for name, labels in dict(train=train, test=test).items()}
    data = load_longtail(saved(tmp_path, **parts))
    assert data.class_names == names and data.train.labels.tolist() == expected
    assert data.test.labels.tolist() == [expected[train.index(value)] for value in test]


def test_lists_of_labels_name_the_columns_that_may_hold_classes(tmp_path):
    several = split([[0], [1]], feature=[Value("int64")]).add_column("kind", [0, 1])
    with pytest.raises(InputError, match=r"lists of labels, .* by --label-column \(there are kind\), or list"):
        load_longtail(saved(tmp_path, train=several, test=several), imb_type="none")


def test_named_classes_without_any_image_are_left_out_unless_a_test_split_has_them(tmp_path):
    three = ClassLabel(names=["a", "b", "c"])
    parts = dict(train=split([0, 2, 2], feature=three), test=split([2, 0], feature=three))
    with pytest.warns(UserWarning, match="no split has an image of 1 of the 3 named classes, .* left out: b"):
        data = load_longtail(saved(tmp_path / "1", **parts))
    assert data.class_names == ("a", "c") and data.class_counts == [1, 2] and data.test.labels.tolist() == [1, 0]
    parts["test"] = split([1, 0], feature=three)  # a class to be told apart, and never learnt
    with pytest.raises(InputError, match="1 of 3 classes have no image: b; add images of them, or remove them"):
        load_longtail(saved(tmp_path / "2", **parts))


def test_text_labels_of_a_test_split_are_those_of_training(tmp_path):
    train = split(["a", "b"], feature=Value("string"))
    test = split(["b", "z", "a", "y"], feature=Value("string"))
    with pytest.raises(InputError, match="split 'test' has classes without a training image: 'y', 'z'"):
        load_longtail(saved(tmp_path, train=train, test=test))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([1, 3], [3, 2], "split 'test' has classes without a training image: '2'"),
        ([1, 3], [3, -1], "label -1 in row 1 of split 'test'"),
        (["a", "b"], [0, 1], "split 'test' has classes without a training image: '0', '1'"),
        ([0, 1], ["0", "1"], "split 'test' has classes without a training image: '0', '1'"),
    ],
)
def test_labels_of_a_test_split_name_the_classes_of_training(tmp_path, train, test, message):
    parts = dict(train=Dataset.from_dict({"image": [png()] * 2, "label": train}))
    parts["test"] = Dataset.from_dict({"image": [png()] * 2, "label": test})
    with pytest.raises(InputError, match=message):
        load_longtail(saved(tmp_path, **parts))


@pytest.mark.parametrize(
    "test, feature, message",
    [
        ([0, 2, 5, 2], None, "split 'test' has classes without a training image: 2, 5"),
        ([-1, -1], TWO, "split 'test' is unlabelled: .* name another split"),
        ([0, -1], None, "label -1 in row 1 of split 'test'"),
        ([0], ClassLabel(names=["b", "a"]), "number their classes differently"),
    ],
)
def test_hostile_test_labels_are_refused(tmp_path, test, feature, message):
    path = saved(tmp_path, train=split([0, 1], feature=feature and TWO), test=split(test, feature=feature))
    with pytest.raises(InputError, match=message):
        load_longtail(path, imb_type="none")


def test_labels_beyond_int64_are_refused(tmp_path):
    table = pa.table({"label": pa.array([0, 2**64 - 1], pa.uint64())})
    train = datasets.concatenate_datasets([split([0, 0]).select_columns("image"), Dataset(table)], axis=1)
    with pytest.raises(InputError, match="label 18446744073709551615 in row 1 of split 'train'"):
        load_longtail(saved(tmp_path, train=train, test=split([0])), imb_type="none")


def pandas_file(folder, form, column, images):
    """A file of these images, as pandas, polars and others write columns, with the labels b, a, b, …"""
    (folder / "photos").mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / "photos" / f"{i}.png").write_bytes(image)
    names = [f"photos/{i}.png" for i in range(len(images))]
    paths = {"absolute": [f"{folder}/{name}" for name in names], "URLs": [f"memory://{name}" for name in names]}
    fsspec.filesystem("memory").pipe(dict(zip(names, images, strict=True)))
    rows = [dict(bytes=image, path=name, height=4) for image, name in zip(images, names, strict=True)]
    values = {
        "bytes": images,
        "large bytes": pa.array(images, pa.large_binary()),
        "struct": [dict(bytes=row["bytes"], path=None) for row in rows],
        "struct of bytes": [dict(bytes=row["bytes"]) for row in rows],
        "struct with more": rows,
        "struct of paths": [dict(bytes=None, path=row["path"]) for row in rows],
        "mixed paths": [f"{folder}/{names[0]}", *names[1:]],
        "large paths": pa.array(names, pa.large_string()),
        "dictionary": pa.array(names).dictionary_encode(),
    }.get(form, paths.get(form, names))
    if "view" in form:
        values = (
            pa.array(images).cast(pa.binary_view()) if form == "view of bytes" else pa.array(names, pa.string_view())
        )
    table = pa.table({column: values, "label": (["b", "a"] * len(images))[: len(images)]})
    path = folder / f"train.{'csv' if form == 'CSV' else 'parquet'}"
    (pa_csv.write_csv if form == "CSV" else parquet.write_table)(table, path)
    return str(path)


needs_views = pytest.mark.skipif(not hasattr(pa, "string_view"), reason="pyarrow 15 has no views")
BYTES = ["bytes", "large bytes", "struct", "struct of bytes", "struct with more"]
BYTES += [pytest.param("view of bytes", marks=needs_views)]
PATHS = ["struct of paths", "mixed paths", "paths", "large paths", "dictionary", "CSV", "absolute", "URLs"]
PATHS += [pytest.param("view of paths", marks=needs_views)]


@pytest.mark.parametrize("column", ["picture", "image"])
@pytest.mark.parametrize("form", BYTES + PATHS)
def test_columns_that_pandas_writes(tmp_path, form, column):
    path = pandas_file(tmp_path / "[my] files", form, column, [png(10 * (1 + i % 2), "L", (5, 4)) for i in range(6)])
    data = load_longtail(path)
    assert data.class_names == ("a", "b") and data.class_counts == [2, 2] and data.train.image_column == column
    assert {(data.train[i][0].getpixel((0, 0))[0], data.train[i][1]) for i in range(4)} == {(10, 1), (20, 0)}


@pytest.mark.parametrize("first", [None, b"junk"])
@pytest.mark.parametrize("kind", ["binary", "string"])
def test_the_first_image_may_be_missing_or_broken(tmp_path, first, kind):
    images = [png(), png()]
    (tmp_path / "0.png").write_bytes(png())
    if kind == "string":
        (tmp_path / "junk.png").write_bytes(b"junk")
        first, images = first and "junk.png", ["0.png", "0.png"]
    table = pa.table({"picture": pa.array([first, *images], kind), "label": [0, 1, 1]})
    for name in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    data = load_longtail(str(tmp_path))
    assert data.train.image_column == "picture" and data.train[1][0].size == (4, 4)
    with pytest.raises(RunError, match="row 0 of split 'train'.* " + ("cannot be read" if first else "is missing")):
        data.train[0]


@pytest.mark.parametrize("stored", ["images", "bytes", "paths"])
def test_other_columns_are_not_taken_for_images(tmp_path, stored):
    names = {"file_name": ["a.jpg"] * 3, "url": ["https://nowhere/a.jpg"] * 3, "label": ["c1.png", "c0.png", "c1.png"]}
    if stored == "images":
        others = Dataset.from_dict(names)
        part = datasets.concatenate_datasets([others, split([0] * 3, "number", data=[png()] * 3)], axis=1)
        path = saved(tmp_path, train=part, test=part)
    else:
        (tmp_path / "0.png").write_bytes(png())
        if stored == "paths":
            del names["file_name"]
        table = pa.table({"label": names.pop("label"), "image": [png() if stored == "bytes" else "0.png"] * 3, **names})
        path = str(tmp_path)
        for name in ("train", "test"):
            parquet.write_table(table, tmp_path / f"{name}.parquet")
    data = load_longtail(path)
    assert data.class_names == ("c0.png", "c1.png") and data.class_counts == [1, 2]
    assert data.train.image_column == "image" and data.train[0][0].size == (4, 4)


def test_a_named_column_needs_no_extension(tmp_path):
    (tmp_path / "0").write_bytes(png())
    table = pa.table({"image": [png(size=(9, 9))] * 3, "file": ["0"] * 3, "label": [0] * 3})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert load_longtail(str(tmp_path)).train[0][0].size == (9, 9)
    assert load_longtail(str(tmp_path), image_column="file").train[0][0].size == (4, 4)


@pytest.mark.parametrize("values", [pa.array([b"junk"] * 3), pa.array([list(png())] * 3), pa.nulls(3)])
def test_columns_of_no_images_are_listed_with_their_types(tmp_path, values):
    parquet.write_table(pa.table({"picture": values, "label": [0] * 3}), tmp_path / "train.parquet")
    with pytest.raises(
        InputError, match=r"has picture \((binary|list.*int64.*|null)\), label \(int64\), and the first"
    ):
        load_longtail(str(tmp_path))


@needs_views
def test_labels_of_string_views(tmp_path):
    table = pa.table({"image": [png()] * 4, "label": pa.array(["b", "a", "b", "b"], pa.string_view())})
    parquet.write_table(table, tmp_path / "train.parquet")
    data = load_longtail(str(tmp_path))
    assert data.class_names == ("a", "b") and data.class_counts == [1, 2]


def test_a_class_called_none_in_a_folder_of_csv_files(tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "lists").mkdir()
    for name in ("train", "test"):
        (tmp_path / "lists" / f"{name}.csv").write_text(f"image,label\n{tmp_path}/0.png,NA\n{tmp_path}/0.png,None\n")
    assert load_longtail(str(tmp_path / "lists")).class_names == ("NA", "None")


def test_a_folder_of_csv_files(tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "lists").mkdir()
    for name in ("train", "test"):
        (tmp_path / "lists" / f"{name}.csv").write_text(f"image,label\n{tmp_path}/0.png,b\n{tmp_path}/0.png,a\n")
    data = load_longtail(str(tmp_path / "lists"))
    assert data.class_counts == [1, 1] and data.test.split == "test" and data.test[0][1] == 1


@pytest.mark.parametrize("photos", ["photos", "data/photos"])
def test_paths_start_at_the_folder_of_the_set_or_of_its_rows(tmp_path, photos):
    (tmp_path / photos).mkdir(parents=True)
    (tmp_path / photos / "0.png").write_bytes(png())
    (tmp_path / "data").mkdir(exist_ok=True)
    table = pa.table({"file": ["photos/0.png"] * 3, "label": [0] * 3})
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    assert load_longtail(str(tmp_path)).train[1][0].size == (4, 4)


def test_paths_without_files_are_refused(tmp_path):
    parquet.write_table(pa.table({"image": ["x/1.jpg"] * 3, "label": [0] * 3}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"column 'image' is read as paths of images, and there is no x/1\.jpg in"):
        load_longtail(str(tmp_path))


def test_urls_that_cannot_be_read_are_refused(tmp_path):
    parquet.write_table(pa.table({"image": ["gopher://a/1.jpg"] * 3, "label": [0] * 3}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"'image' holds URLs that cannot be read here, such as gopher://a/1\.jpg \(V"):
        load_longtail(str(tmp_path))


@pytest.mark.parametrize("name", ["list.csv", "LIST.CSV"])
def test_classes_of_a_csv_file_may_be_called_like_missing_values(tmp_path, name):
    (tmp_path / "0.png").write_bytes(png())
    rows = [f"0.png,{label}" for label in ("None", "NA", "null") for _ in range(3)]
    (tmp_path / name).write_text("\n".join(["image,label", *rows]))
    assert load_longtail(str(tmp_path / name)).class_names == ("NA", "None", "null")
    (tmp_path / name).write_text("\n".join(["image,label", *rows, "0.png,"]))
    with pytest.raises(InputError, match="has no value in row 9 "):
        load_longtail(str(tmp_path / name))
