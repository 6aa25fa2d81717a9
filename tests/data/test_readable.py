"""Images that cannot be read, found before training and left out."""

from dataclasses import replace

import numpy as np
import pytest
from encoded_images import encoded, image_set, smooth

from ride_timm import InputError
from ride_timm.data.image_set import LongTailData
from ride_timm.data.readable import find_unreadable, leave_out

GOOD = encoded(smooth(8, 8), "PNG")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_unreadable_image_is_found_once(num_workers, num_processes, capsys):
    images = image_set(*(b"junk" if i in (3, 4, 69) else None if i == 40 else GOOD for i in range(70)))
    images = images.select(np.arange(69, -1, -1))
    found = [find_unreadable(images, num_workers, rank, num_processes) for rank in range(num_processes)]
    assert sorted(row for part in found for row, _ in part) == [3, 4, 40, 69]
    assert dict(found[0] + found[-1])[40] == "the image in row 40 of split 'train' is missing: the row holds none"
    assert "reading train" in capsys.readouterr().err


def test_they_are_left_out_of_the_training_images_alone():
    images = image_set(b"junk", GOOD, GOOD, GOOD)
    test = replace(images, split="test")
    data = LongTailData(images.select([3, 2, 0, 1]), test, ("a", "b"), "own")
    assert leave_out(data, []) is data and data.unreadable_notice is None
    left = leave_out(data, find_unreadable(images))
    assert left.train.rows.tolist() == [3, 2, 1] and left.class_counts == [1, 2] and left.test is test
    assert left.unreadable_notice.startswith("notice: unreadable training images left out, 1: the image in row 0")
    with pytest.raises(InputError, match=r"no training image of a can be read: no reason"):
        leave_out(data, [(0, "no reason"), (2, "another")])
