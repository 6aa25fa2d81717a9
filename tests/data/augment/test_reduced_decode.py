"""Reduced decoding: the same crops, nearly the same pixels, and in full wherever the format does not allow it."""

import contextlib
import gc
import io
import weakref

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torchvision import transforms as T

from ride_timm.data.augment.reduced_decode import read_resized, reduction, upright
from ride_timm.data.augment.transforms import Fit, RandomResizedCrop, build_crop, build_transform
from ride_timm.data.load import ImageSet
from ride_timm.data.loaders.loader import make_loader
from ride_timm.errors import RunError

ORIENTATION = 0x0112


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Slow waves in every channel, no two corners alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(4 * x + 3 * y), np.cos(5 * y - x), np.sin(6 * x * y), np.cos(3 * x)])
    bands = [Image.fromarray(wave) for wave in (127.5 + 127.5 * waves).astype(np.uint8)]
    return Image.merge(mode, bands[: len(Image.new(mode, (1, 1)).getbands())])


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int | None = None, **options) -> bytes:
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **{"quality": 95, **options} if kind == "JPEG" else options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def plainly(data: bytes) -> Image.Image:
    """Decoded in full, upright, RGB."""
    return ImageOps.exif_transpose(opened(data)).convert("RGB")


def image_set(*data: bytes | None) -> ImageSet:
    features = Features(image=datasets.Image())
    images = Dataset.from_dict({"image": [d and {"bytes": d, "path": None} for d in data]}, features=features)
    return ImageSet(images, np.arange(len(data)), np.arange(len(data)) % 2, "image")


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    assert a.size == b.size and a.mode == b.mode == "RGB"
    return np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, int]]:
    """The sizes that JPEGs were decoded at."""
    sizes, load = [], JpegImageFile.load

    def spy(self):
        if self.tile:
            sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", spy)
    return sizes


# the factor


@pytest.mark.parametrize(
    "side, factor",
    [(1, 1), (223, 1), (224, 1), (447.9, 1), (448, 2), (895, 2), (896, 4), (1791, 4), (1792, 8), (9999, 8)],
)
def test_the_box_stays_at_least_as_large_as_the_output(side, factor):
    assert reduction((5, 7, 5 + side, 7 + 20_000), (224, 224)) == factor
    assert reduction((5, 7, 5 + 20_000, 7 + side), (224, 224)) == factor


@pytest.mark.parametrize(
    "size", [(1792, 1793), (1799, 2400), (451, 448), (897, 5000), (224, 224), (8, 8), (15, 15), (3, 3)]
)
def test_the_jpeg_is_decoded_at_the_factor_asked_for(decoded, size):
    output = min(size[0], 224), min(size[0], 224)
    read_resized(opened(encoded(smooth(*size))), lambda w, h: ((0, 0, w, h), output))
    factor = reduction((0, 0, *size), output)
    assert decoded == [tuple(-(-side // factor) for side in size)]


def test_reduced_decoding_takes_place(decoded):
    data = image_set(encoded(smooth(2000, 1500)))
    common = {"batch_size": 1, "seed": 0, "input_size": 224}
    list(make_loader(data, "imagenet", train=False, **common))
    assert decoded == [(500, 375)]  # 1500 / 4 >= 256 > 1500 / 8
    list(make_loader(data, "imagenet", train=False, reduced_decode=False, **common))
    assert decoded[1:] == [(2000, 1500)]
    loader = make_loader(data, "inat", train=True, **common)
    for epoch in range(20):
        loader.set_epoch(epoch)
        list(loader)
    assert {(1000, 750), (500, 375)} <= set(decoded[2:]) <= {(2000, 1500), (1000, 750), (500, 375), (250, 188)}


def test_small_images_held_in_memory_are_decoded_in_full(decoded):
    data = encoded(smooth(200, 150))
    build_transform("cifar", train=True)(opened(data))
    list(make_loader(image_set(data), "cifar", train=True, batch_size=1, seed=0))
    assert decoded == [(200, 150)] * 2


# the crops


def test_boxes_are_those_of_torchvision_whether_reduced_or_not():
    ours, theirs = RandomResizedCrop(64, reduced_decode=True), T.RandomResizedCrop(64)
    for width, height in ((500, 375), (375, 500), (1000, 90), (64, 64)):
        image = Image.new("RGB", (width, height))
        for seed in range(50):
            torch.manual_seed(seed)
            top, left, h, w = theirs.get_params(image, theirs.scale, theirs.ratio)
            expected = (left, top, left + w, top + h), torch.rand(1).item()
            torch.manual_seed(seed)
            box, size = ours.plan(width, height)
            assert (box, torch.rand(1).item()) == expected and size == (64, 64)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_boxes_are_drawn_in_the_upright_image(monkeypatch, orientation):
    data, seen = encoded(smooth(600, 350), orientation=orientation), []
    plan = RandomResizedCrop.plan
    monkeypatch.setattr(RandomResizedCrop, "plan", lambda self, *size: seen.append(size) or plan(self, *size))
    for reduced in (True, False):
        RandomResizedCrop(32, reduced)(opened(data))
    assert seen == [plainly(data).size] * 2


# the pixels


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_formats_give_the_very_pixels_of_torchvision(kind, mode):
    """JPEGs do so where reduced decoding is off, or where the box is too small for it."""
    data = encoded(smooth(301, 203, mode), kind)
    for reduced in (True, False) if kind != "JPEG" else (False,):
        expected = T.Compose([T.Resize(64), T.CenterCrop(56)])(plainly(data))
        assert difference(Fit(56, 64, reduced)(opened(data)), expected).max() == 0
        for seed in range(20):
            torch.manual_seed(seed)
            expected = T.RandomResizedCrop(40)(plainly(data))
            torch.manual_seed(seed)
            assert difference(RandomResizedCrop(40, reduced)(opened(data)), expected).max() == 0
    assert difference(Fit(150, 170, True)(opened(data)), T.CenterCrop(150)(T.Resize(170)(plainly(data)))).max() == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("policy", ["imagenet", "inat"])
@pytest.mark.parametrize("train", [True, False])
def test_a_whole_transform_equals_torchvision(policy, train, kind):
    data = encoded(smooth(300, 260), kind)
    transform = build_transform(policy, train, 48, reduced_decode=False)
    plain = [T.RandomResizedCrop(48)] if train else [T.Resize(55), T.CenterCrop(48)]
    torch.manual_seed(3)
    expected = T.Compose([*plain, *transform.transforms[1:]])(plainly(data))
    torch.manual_seed(3)
    assert torch.equal(transform(opened(data)), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("progressive", [False, True])
def test_reduced_pixels_are_close(decoded, mode, orientation, progressive):
    data = encoded(smooth(1203, 901, mode), orientation=orientation, progressive=progressive)
    full = [difference(Fit(96, 110, reduced)(opened(data)), Fit(96, 110)(plainly(data))) for reduced in (False, True)]
    assert full[0].max() == 0 and full[1].mean() < 1 and full[1].max() < 8
    for seed in range(8):
        torch.manual_seed(seed)
        expected = T.RandomResizedCrop(64)(plainly(data))
        torch.manual_seed(seed)
        apart = difference(RandomResizedCrop(64, True)(opened(data)), expected)
        assert apart.mean() < 1 and apart.max() < 8
    assert min(decoded)[0] < 400


def test_a_reduced_crop_is_not_shifted():
    """A fine ramp: its values tell the place to a fraction of a pixel."""
    ramp = np.broadcast_to(np.linspace(20, 235, 1600)[None, :, None], (1200, 1600, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(ramp))
    for left in (101, 102, 103, 337):
        box = (left, left, left + 801, left + 803)
        reduced, full = (read_resized(opened(data), lambda *_, b=box: (b, (100, 100)), flag) for flag in (True, False))
        assert difference(reduced, full).mean() < 0.5


def test_decoded_images_serve_as_well():
    image = opened(encoded(smooth(640, 480)))
    image.load()
    assert difference(Fit(56, 64, True)(image), Fit(56, 64)(image)).max() == 0
    assert upright(image) is image


# grey of more than 8 bits


GREY = np.array([[0, 1, 77], [128, 254, 255]])


@pytest.mark.parametrize(
    ("kind", "mode", "orientation"),
    [
        ("PNG", "I;16", None),
        ("PNG", "I;16", 6),
        ("TIFF", "I;16", 6),
        ("TIFF", "I;16B", None),
        ("TIFF", "I;16B", 6),
        ("PPM", "I", None),
        ("JPEG2000", "I;16", None),
    ],
)
def test_grey_of_16_bits_becomes_that_of_8(kind, mode, orientation):
    pixels = Image.fromarray((257 * GREY).astype(np.uint16))
    if mode == "I;16B":
        pixels = Image.frombytes(mode, pixels.size, (257 * GREY).astype(">u2").tobytes())
    data = encoded(pixels, kind, orientation)
    assert opened(data).mode == mode
    image = upright(opened(data))
    expected = GREY if orientation is None else np.rot90(GREY, -1)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=2))
    assert difference(read_resized(opened(data), lambda w, h: ((0, 0, w, h), (w, h))), image).max() == 0


def test_a_png_that_pillow_opens_as_32_bits_has_16():
    """As its older versions do."""
    image = Image.fromarray((257 * GREY).astype(np.int32))
    image.format = "PNG"
    assert np.array_equal(np.asarray(upright(image))[..., 0], GREY)


def test_integers_of_8_bits_in_32_stay_as_they_are():
    data = encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF")
    assert opened(data).mode == "I" and np.array_equal(np.asarray(upright(opened(data)))[..., 1], GREY)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY.astype(np.float32) / 255, "pixels of mode F have no known range; save it with 8 or 16 bits"),
        (GREY.astype(np.int32) + 1, "pixels of mode I from 1 to 256 have no known range"),
        (GREY.astype(np.int32) - 1, "pixels of mode I from -1 to 254 have no known range"),
    ],
)
def test_pixels_of_no_known_range_are_refused_by_their_row(pixels, message):
    data = encoded(Image.fromarray(pixels), "TIFF")
    with pytest.raises(OSError, match=message):
        upright(opened(data))
    images = image_set(encoded(smooth(4, 4)), data)
    with pytest.raises(RunError, match=rf"row 1 of split 'train' cannot be read \(OSError: {message}"):
        images[1]
    for train in (True, False):
        with pytest.raises(RunError, match=rf"row 1 of split 'train' cannot be read \(OSError: {message}"):
            list(make_loader(images, "imagenet", train=train, batch_size=2, seed=0, input_size=8))


# the set


def test_items_of_a_set_are_decoded_in_full(decoded):
    data = encoded(smooth(700, 500), orientation=6)
    image, label = image_set(data)[0]
    assert difference(image, plainly(data)).max() == 0 and image.size == (500, 700) and label == 0
    assert decoded[0] == (700, 500)


def test_files_and_modes_of_the_column(tmp_path):
    data = encoded(smooth(640, 480))
    (tmp_path / "a.jpg").write_bytes(data)
    dataset = Dataset.from_dict({"image": [str(tmp_path / "a.jpg")]}, features=Features(image=datasets.Image()))
    crop = build_crop("imagenet", train=False, input_size=48)
    by_path = ImageSet(dataset, np.arange(1), np.zeros(1, dtype=np.int64), "image")
    by_bytes = image_set(data)
    assert difference(by_path.read(0, crop)[0], by_bytes.read(0, crop)[0]).max() == 0
    gray = ImageSet(
        dataset.cast_column("image", datasets.Image(mode="L")), np.arange(1), np.zeros(1, dtype=np.int64), "image"
    )
    assert difference(gray[0][0], plainly(data).convert("L").convert("RGB")).max() == 0
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(RunError, match=r"row 0 of split 'train' cannot be read \(FileNotFoundError"):
        by_path.read(0, crop)


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


def test_after_an_error_nothing_holds_the_loader_and_its_workers():
    """Else they stop when the garbage collector finds them, each after waiting for five seconds."""
    loader = make_loader(image_set(None), "imagenet", train=True, batch_size=1, seed=0, input_size=48, num_workers=1)
    gone = weakref.ref(loader)
    gc.disable()
    try:
        with contextlib.suppress(RunError):
            list(loader)
        del loader
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("train", [True, False])
def test_the_number_of_workers_changes_nothing_for_jpegs(train):
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(80, 400, 2).tolist()) for _ in range(7)]
    data = image_set(*(encoded(smooth(*size), orientation=i % 9 or None) for i, size in enumerate(sizes)))
    common = {"train": train, "batch_size": 3, "seed": 4, "input_size": 24}
    runs = []
    for num_workers in (0, 1, 2):
        loader = make_loader(data, "imagenet", num_workers=num_workers, **common)
        loader.set_epoch(1)
        runs.append([part for batch in loader for part in batch])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
