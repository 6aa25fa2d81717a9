"""Reduced decoding: the same crops, nearly the same pixels, and in full wherever the format does not allow it."""

import numpy as np
import pytest
import torch
from encoded_images import difference, encoded, image_set, opened, plainly, smooth
from PIL import Image
from torchvision import transforms as T

from ride_timm.data.augment.images import Fit, Planned, RandomResizedCrop, decode_full, upright
from ride_timm.data.augment.reduced_decode import decode_reduced, reduction
from ride_timm.data.loaders import make_loader
from ride_timm.errors import RunError

DECODERS = (decode_full, decode_reduced)

# the factor


@pytest.mark.parametrize(
    "size, factor",
    [(1, 1), (223, 1), (224, 1), (447.9, 1), (448, 2), (895, 2), (896, 4), (1791, 4), (1792, 8), (9999, 8)],
)
def test_the_box_stays_at_least_as_large_as_the_output(size, factor):
    assert reduction((5, 7, 5 + size, 7 + 20_000), (224, 224)) == factor
    assert reduction((5, 7, 5 + 20_000, 7 + size), (224, 224)) == factor


@pytest.mark.parametrize(
    "size", [(1792, 1793), (1799, 2400), (451, 448), (897, 5000), (224, 224), (8, 8), (15, 15), (3, 3)]
)
def test_the_jpeg_is_decoded_at_the_factor_asked_for(decoded, size):
    output = min(size[0], 224), min(size[0], 224)
    decode_reduced(opened(encoded(smooth(*size))), lambda w, h: Planned((0, 0, w, h), output))
    factor = reduction((0, 0, *size), output)
    assert decoded == [tuple(-(-edge // factor) for edge in size)]


def test_large_images_are_decoded_at_reduced_size(decoded):
    data = image_set(encoded(smooth(2000, 1500)))
    common = {"batch_size": 1, "seed": 0, "input_size": 224, "reduced_decode": True}
    list(make_loader(data, "imagenet", train=False, **common))
    assert decoded == [(500, 375)]  # 1500 / 4 >= 256 > 1500 / 8
    list(make_loader(data, "imagenet", train=False, **common | {"reduced_decode": False}))
    assert decoded[1:] == [(2000, 1500)]
    loader = make_loader(data, "inat", train=True, **common)
    for epoch in range(20):
        loader.set_epoch(epoch)
        list(loader)
    assert {(1000, 750), (500, 375)} <= set(decoded[2:]) <= {(2000, 1500), (1000, 750), (500, 375), (250, 188)}


# the crops


def test_boxes_are_those_of_torchvision_whether_reduced_or_not():
    ours, theirs = RandomResizedCrop(64, decode_reduced), T.RandomResizedCrop(64)
    for width, height in ((500, 375), (375, 500), (1000, 90), (64, 64)):
        image = Image.new("RGB", (width, height))
        for seed in range(50):
            torch.manual_seed(seed)
            top, left, h, w = theirs.get_params(image, theirs.scale, theirs.ratio)
            expected = (left, top, left + w, top + h), torch.rand(1).item()
            torch.manual_seed(seed)
            box, size, _ = ours.plan(width, height)
            assert (box, torch.rand(1).item()) == expected and size == (64, 64)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_boxes_are_drawn_in_the_upright_image(monkeypatch, orientation):
    data, seen = encoded(smooth(600, 350), orientation=orientation), []
    plan = RandomResizedCrop.plan
    monkeypatch.setattr(RandomResizedCrop, "plan", lambda self, *size: seen.append(size) or plan(self, *size))
    for decoder in DECODERS:
        RandomResizedCrop(32, decoder)(opened(data))
    assert seen == [plainly(data).size] * 2


# the pixels


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_formats_give_the_very_pixels_of_torchvision(kind, mode):
    """JPEGs do so where reduced decoding is off, or where the box is too small for it."""
    data = encoded(smooth(301, 203, mode), kind)
    for decoder in DECODERS if kind != "JPEG" else (decode_full,):
        expected = T.Compose([T.Resize(64), T.CenterCrop(56)])(plainly(data))
        assert difference(Fit(56, 64, decoder)(opened(data)), expected).max() == 0
        for seed in range(20):
            torch.manual_seed(seed)
            expected = T.RandomResizedCrop(40)(plainly(data))
            torch.manual_seed(seed)
            assert difference(RandomResizedCrop(40, decoder)(opened(data)), expected).max() == 0
    assert (
        difference(Fit(150, 170, decode_reduced)(opened(data)), T.CenterCrop(150)(T.Resize(170)(plainly(data)))).max()
        == 0
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("progressive", [False, True])
def test_reduced_pixels_are_close(decoded, mode, orientation, progressive):
    data = encoded(smooth(1203, 901, mode), orientation=orientation, progressive=progressive)
    full = [difference(Fit(96, 110, decoder)(opened(data)), Fit(96, 110)(plainly(data))) for decoder in DECODERS]
    assert full[0].max() == 0 and full[1].mean() < 1 and full[1].max() < 8
    for seed in range(8):
        torch.manual_seed(seed)
        expected = T.RandomResizedCrop(64)(plainly(data))
        torch.manual_seed(seed)
        apart = difference(RandomResizedCrop(64, decode_reduced)(opened(data)), expected)
        assert apart.mean() < 1 and apart.max() < 8
    assert min(decoded)[0] < 400


def test_a_reduced_crop_is_not_shifted():
    """A fine ramp: its values give the position to a fraction of a pixel."""
    ramp = np.broadcast_to(np.linspace(20, 235, 1600)[None, :, None], (1200, 1600, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(ramp))
    for left in (101, 102, 103, 337):
        box = (left, left, left + 801, left + 803)
        full, reduced = (decoder(opened(data), lambda *_, b=box: Planned(b, (100, 100))) for decoder in DECODERS)
        assert difference(reduced, full).mean() < 0.5


def test_decoded_images_work_as_well():
    image = opened(encoded(smooth(640, 480)))
    image.load()
    assert difference(Fit(56, 64, decode_reduced)(image), Fit(56, 64)(image)).max() == 0
    assert upright(image) is image


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("broken", ["truncated", "header", "junk", "missing"])
def test_a_corrupt_jpeg_names_its_row(broken, reduced, train, num_workers):
    good = encoded(smooth(640, 480))
    bad = {"truncated": good[: len(good) // 2], "header": good[:30], "junk": b"\xff\xd8junk", "missing": None}[broken]
    loader = make_loader(
        image_set(good, good, bad).select([0, 2]),
        "imagenet",
        train=train,
        batch_size=1,
        seed=0,
        num_workers=num_workers,
        input_size=48,
        reduced_decode=reduced,
    )
    with pytest.raises(RunError, match=r"^the image in row 2 of split 'train' (cannot be read \([^\n]*\)$|is missing)"):
        list(loader)
