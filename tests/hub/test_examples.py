"""Drawings as example images of releases whose data may not be published."""

import pytest
import torch
from examples import draw_examples
from folder import EXAMPLES
from PIL import Image
from release_files import TAG, front_matter
from stage import stage
from torchvision.transforms.functional import to_tensor
from verify import verify

from ride_timm.inference.demo.drawings import DRAWINGS

CLASSES = ["ant", *sorted(DRAWINGS)]
COUNTS = [800, 700, 600, 500, 400, 300, 200, 100]


class Nearest(torch.nn.Module):
    """Predicts the drawing that an image is, by nearest pixels; `wrong` is taken for an ant."""

    def __init__(self, *wrong):
        super().__init__()
        self.wrong, self.in_chans = wrong, 3
        self.pretrained_cfg = dict(input_size=(3, 256, 256), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)

    def forward(self, images):
        drawings = torch.stack([to_tensor(DRAWINGS[name]()) for name in CLASSES[1:]])
        nearest = CLASSES[1 + int((images - drawings).abs().mean((1, 2, 3)).argmin())]
        scores = torch.full((1, len(CLASSES)), 0.05)
        scores[0, 0 if nearest in self.wrong else CLASSES.index(nearest)] = 0.65
        return scores.log()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ((), ["airplane", "clock", "sunflower"]),  # the most frequent of those drawn, the middle, the rarest
        (("airplane", "sunflower"), ["apple", "clock", "ship"]),
        (tuple(DRAWINGS.keys() - {"bottle"}), ["bottle"]),
        (tuple(DRAWINGS), []),
    ],
)
def test_drawings_that_are_predicted_right(tmp_path, wrong, expected):
    examples = draw_examples(Nearest(*wrong), CLASSES, COUNTS, tmp_path)
    assert [example["class"] for example in examples] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(EXAMPLES[: len(expected)])
    for example in examples:
        name = example["class"]
        assert list(Image.open(tmp_path / example["file"]).getdata()) == list(DRAWINGS[name]().getdata())
        assert example["train_images"] == COUNTS[CLASSES.index(name)] and example["drawn"]
        assert example["output"][0] == dict(label=name, score=0.65) and len(example["output"]) == 3


def test_a_staged_release_has_drawings_in_its_widget(run, tmp_path, monkeypatch):
    names = ["ant", "bee", "cicada", "drone"]
    monkeypatch.setattr("examples.DRAWINGS", dict.fromkeys(names, DRAWINGS["apple"]))  # right of one class alone
    staged = stage(run, TAG, tmp_path)
    verify(staged)
    (example,) = front_matter((staged.path / "README.md").read_text(encoding="utf-8"))["widget"]
    name = example["output"][0]["label"]
    images = dict(zip(names, (300, 150, 120, 30), strict=True))[name]
    assert (
        example["src"] == "example_head.png" and example["example_title"] == f"{name}, drawn ({images} training images)"
    )
    assert staged.has("example_head.png")
