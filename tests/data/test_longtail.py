"""The authors' splits, number by number, and what is refused."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from ride_timm.data.longtail import check_labels, class_sizes, longtail_indices
from ride_timm.errors import InputError

GOLDEN = json.loads((Path(__file__).parent / "splits.json").read_text())  # made by running the authors' sampler


@pytest.mark.parametrize("case", GOLDEN["splits"], ids=lambda c: f"{c['classes']}-{c['imb_type']}-{c['imb_factor']}")
def test_rows_equal_the_authors(case):
    labels = np.repeat(np.arange(case["classes"]), case["per_class"])
    np.random.RandomState(case["target_seed"]).shuffle(labels)
    rows = longtail_indices(labels, case["imb_type"], case["imb_factor"], case["rand_number"])
    assert rows.dtype == np.int64
    assert len(rows) == case["num"]
    assert rows[:25].tolist() == case["first_indices"]
    assert rows[-25:].tolist() == case["last_indices"]
    assert rows.sum() == case["index_sum"]
    assert np.bincount(labels[rows]).tolist() == case["cls_num_list"]


@pytest.mark.parametrize("name", GOLDEN["real_sizes"])
def test_sizes_equal_the_authors(name):
    data, imb_type, factor = name.split("_")
    sizes = class_sizes(50_000, int(data.removeprefix("cifar")), imb_type, float(factor))
    assert sizes == GOLDEN["real_sizes"][name]["cls_num_list"]
    assert sum(sizes) == GOLDEN["real_sizes"][name]["total"]


def test_rows_equal_a_plain_loop():
    labels = np.random.RandomState(3).randint(0, 7, 500)
    rng, expected = np.random.RandomState(5), []
    for c, size in enumerate(class_sizes(500, 7, "exp", 0.1)):
        members = np.where(labels == c)[0]
        rng.shuffle(members)
        expected += members[:size].tolist()
    assert longtail_indices(labels, "exp", 0.1, seed=5).tolist() == expected
    assert longtail_indices(labels, "exp", 0.1, seed=6).tolist() != expected


def test_global_generator_is_left_alone():
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    longtail_indices([0, 1] * 50, "exp", 0.1)
    assert np.random.rand() == expected


def test_odd_step_gives_the_middle_class_to_the_tail():
    assert class_sizes(500, 5, "step", 0.1) == [100, 100, 10, 10, 10]


@pytest.mark.parametrize("imb_type", ["exp", "step", "none"])
def test_factor_one_and_one_class_keep_everything(imb_type):
    assert class_sizes(30, 3, imb_type, 1) == [10, 10, 10]
    assert class_sizes(30, 1, imb_type, 0.1) == [30]


def test_none_keeps_rows_and_their_order():
    assert longtail_indices([2, 0, 1, 0, 0], "none", 0.01).tolist() == [0, 1, 2, 3, 4]


def test_a_class_smaller_than_its_size_is_kept_completely():
    labels = np.repeat([0, 1], [3, 97])  # n_max is 50 for both
    assert np.bincount(labels[longtail_indices(labels, "exp", 1.0)]).tolist() == [3, 50]


def test_a_million_labels_take_well_under_a_second():
    labels = np.random.RandomState(0).randint(0, 1000, 1_000_000)
    start = time.process_time()
    longtail_indices(labels, "exp", 0.01)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("factor", [0, -0.1, 1.0001, float("nan"), float("inf"), "0.1", None, True])
def test_factor_outside_range_is_refused(factor):
    with pytest.raises(InputError, match=r"outside \(0, 1\]"):
        longtail_indices([0, 1], "none", factor)


def test_a_factor_written_as_in_papers_is_explained():
    with pytest.raises(InputError, match=r"papers write IF 100 for the factor 0\.01"):
        class_sizes(100, 10, "exp", 100)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True])
def test_unusable_seed_is_refused(seed):
    with pytest.raises(InputError, match="split seed"):
        longtail_indices([0, 1], "exp", 0.5, seed)


def test_unknown_type_is_refused():
    with pytest.raises(InputError, match="unknown imbalance type 'linear'; choose one of exp, step, none"):
        class_sizes(100, 10, "linear", 0.1)


def test_classes_left_empty_are_refused_with_the_smallest_factor_that_works():
    with pytest.raises(InputError, match=r"leaves no image for 3 of 10 classes .* at least 0\.1,"):
        class_sizes(100, 10, "exp", 0.05)
    for num_images in (10, 30, 77, 100, 123, 1084, 9999):
        with pytest.raises(InputError) as error:
            class_sizes(num_images, 10, "step", 1e-5)
        factor = float(re.search(r"at least ([\d.e-]+),", str(error.value)).group(1))
        assert min(class_sizes(num_images, 10, "step", factor)) == 1
    with pytest.raises(InputError, match=r"leaves no image for 10 of 10 classes .*; use more images"):
        class_sizes(9, 10, "exp", 1)


@pytest.mark.parametrize(
    "labels, num_classes, message",
    [
        ([], None, "zero images"),
        ([0.0, 1.0], None, "one integer an image, not float64"),
        ([True, False], None, "not bool"),
        (["a", "b"], None, "one integer an image"),
        ([[0, 1]], None, r"of shape \(1, 2\)"),
        ([0, -1, 1], None, "label -1 at row 1 is outside 0 … 1"),
        ([0, 1, 2], 2, "label 2 at row 2 is outside 0 … 1"),
        ([0, 2, 4], None, "2 of 5 classes have no image: 1, 3;"),
        ([0, 1], 14, "12 of 14 classes have no image: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …"),
        ([0, 10**12], None, "have no image: 1, 2, 3"),
    ],
)
def test_unusable_labels_are_refused(labels, num_classes, message):
    with pytest.raises(InputError, match=message):
        longtail_indices(labels, "exp", 0.5, num_classes=num_classes)


def test_labels_of_any_integer_type_become_int64():
    labels, num_classes = check_labels(np.array([0, 2, 1], dtype=np.uint8))
    assert labels.dtype == np.int64 and num_classes == 3
