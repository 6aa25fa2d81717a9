"""Classes of a model and of data, matched by their names."""

import numpy as np
import pytest

from ride_timm.data.class_order import class_order
from ride_timm.data.image_set import ImageSet, LongTailData
from ride_timm.errors import InputError

ABC, NUMBERS = ("a", "b", "c"), ("0", "1", "2")


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        (ABC, ABC, [0, 1, 2]),
        (ABC, NUMBERS, [0, 1, 2]),
        (NUMBERS, ABC, [0, 1, 2]),
        (("c", "a", "b"), ABC, [2, 0, 1]),
        (("a/A", "b-b", "c"), ("B b", "C", "a_a"), [2, 0, 1]),  # as folders spell them
        (("!", "?", "c"), ("?", "!", "c"), [1, 0, 2]),  # nothing is left of two
    ],
)
def test_the_order_is_the_models(names, own, expected, recwarn):
    assert class_order(names, own, "m") == expected and not recwarn


def test_classes_of_other_names_are_matched_by_number_unless_some_contradict():
    with pytest.warns(UserWarning, match="by their numbers: m and the data name them differently, such as 'x' and 'a'"):
        assert class_order(("x", "b", "c"), ABC, "m") == [0, 1, 2]
    with pytest.raises(InputError, match="class 'b' is number 2 of m and 1 of the data"):
        class_order(("x", "c", "b"), ABC, "m")


def test_data_in_another_order():
    """Two training images of the first class, one of every other; a test image of each."""
    sets = [ImageSet(None, np.arange(len(y)), np.array(y), "image", "s") for y in ([0, 0, 1, 2], [0, 1, 2])]
    data = LongTailData(*sets, ABC, "set").in_order([2, 0, 1])
    assert data.class_names == ("c", "a", "b") and data.class_counts == [1, 2, 1]
    assert data.train.labels.tolist() == [1, 1, 2, 0] and data.test.labels.tolist() == [1, 2, 0]
