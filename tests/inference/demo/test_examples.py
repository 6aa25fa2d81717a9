"""Example images: of the embedded set, from head to tail."""

from PIL import Image

from ride_timm.inference.demo.examples import write_examples


def test_examples_go_from_head_to_tail(tmp_path):
    paths = write_examples("fashion_lt", tmp_path)
    assert [path.name for path in paths] == [
        "T-shirt-top.png",
        "Pullover.png",
        "Coat.png",
        "Sneaker.png",
        "Ankle boot.png",
    ]
    assert all(Image.open(path).size == (28, 28) for path in paths)
    assert len({path.read_bytes() for path in paths}) == 5


def test_no_examples_of_other_data(tmp_path):
    assert write_examples("cifar100", tmp_path) == write_examples(None, tmp_path) == []
