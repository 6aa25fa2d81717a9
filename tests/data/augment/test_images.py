"""Transforms of single images: timm's and torchvision's pixels, the authors' steps, every depth of grayscale."""

import zlib

import numpy as np
import PIL
import pytest
import torch
from encoded_images import difference, encoded, image_set, opened, plainly, smooth
from PIL import Image, PngImagePlugin
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torchvision import transforms as T

from ride_timm.data.augment.images import (
    Cutout,
    Fit,
    RandomResizedCrop,
    TensorCrop,
    build_augment,
    build_crop,
    build_transform,
    decode_full,
    open_image,
    upright,
)
from ride_timm.data.augment.policies import POLICIES, backbone_policy
from ride_timm.data.loaders import make_loader
from ride_timm.errors import InputError, RunError


def pixels(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name, size, resize", [("imagenet", 224, 256), ("inat", 224, 256), ("imagenet", 96, 109)])
def test_large_images_are_resized_and_cropped_at_the_centre(name, size, resize):
    image = Image.fromarray(pixels(300, 400).numpy())
    policy = POLICIES[name]
    steps = [T.Resize(resize), T.CenterCrop(size), T.ToTensor(), T.Normalize(policy.mean, policy.std)]
    assert torch.equal(build_transform(name, train=False, input_size=size)(image), T.Compose(steps)(image))


def timm_test_transform(name: str, size: int) -> T.Compose:
    """The test transform that timm builds from the config.json of a model trained with this policy."""
    return create_transform(**POLICIES[name].data_config(size))


@pytest.mark.parametrize("name", POLICIES)
def test_the_test_transform_resizes_as_timm_does_at_every_size(name):
    resized = {size: build_transform(name, False, size).transforms[0].resize for size in range(64, 513)}
    assert resized == {size: timm_test_transform(name, size).transforms[0].size for size in range(64, 513)}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [64, 96, 160, 224, 256, 320, 384, 511, 512])
def test_the_test_transform_equals_timms_bit_for_bit(name, size):
    image = Image.fromarray(pixels(300, 401).numpy())
    assert torch.equal(build_transform(name, False, size)(image), timm_test_transform(name, size)(image))


BACKBONES = {
    "tf_efficientnet_lite0": (224, 0.875, "bicubic"),
    "convnext_nano.in12k_ft_in1k": (224, 0.95, "bicubic"),
    "convnext_base.fb_in22k_ft_in1k_384": (384, 1.0, "bicubic"),  # crop mode squash
    "regnety_032.ra_in1k": (224, 0.95, "bicubic"),
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": (224, 0.9, "bicubic"),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbones_images_are_those_of_its_cfg_bit_for_bit(backbone):
    policy, size = backbone_policy(backbone), 96
    assert (policy.size, policy.crop_pct, policy.interpolation) == BACKBONES[backbone]
    theirs = resolve_data_config(
        dict(input_size=(3, size, size)), pretrained_cfg=get_pretrained_cfg(backbone).to_dict()
    )
    image = Image.fromarray(pixels(300, 401).numpy())
    transform = build_transform(policy, False, size)
    assert torch.equal(transform(image), create_transform(**theirs)(image))
    assert torch.equal(transform(image), create_transform(**policy.data_config(size))(image))  # as config.json says
    torch.manual_seed(0)
    crop = T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC)(image)
    torch.manual_seed(0)
    assert difference(build_crop(policy, True, size)(image), crop).max() == 0


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 4)])
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "turned", "L", "CMYK", "PNG"])
def test_a_crop_by_torch_is_that_of_pillow_to_rounding(kind, interpolation, most):
    mode = kind if kind in ("L", "CMYK") else "RGB"
    options = {"progressive": dict(progressive=True), "turned": dict(orientation=6)}.get(kind, {})
    data = encoded(smooth(301, 203, mode), "PNG" if kind == "PNG" else "JPEG", **options)
    for seed in range(10):
        torch.manual_seed(seed)
        expected, after = RandomResizedCrop(40, interpolation=interpolation)(opened(data)), torch.rand(1)
        torch.manual_seed(seed)
        found = TensorCrop(40, interpolation=interpolation)(opened(data))
        assert found.dtype == torch.uint8 and found.shape == (3, 40, 40) and torch.equal(torch.rand(1), after)
        apart = difference(Image.fromarray(found.permute(1, 2, 0).numpy()), expected)
        assert apart.max() <= (most if kind in ("JPEG", "progressive") else 0) and apart.mean() < 0.2


@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_jpeg_is_refused_by_torch_as_by_pillow(part):
    data = encoded(smooth(301, 203))
    for crop in (RandomResizedCrop, TensorCrop):
        with pytest.raises((OSError, RuntimeError, SyntaxError)):
            crop(40)(opened(data[: int(part * len(data))]))


@pytest.mark.parametrize("backbone, words", [("resnt50", "no such model"), ("resnet50.nothing", "nothing")])
def test_a_backbone_that_timm_does_not_know_is_named(backbone, words):
    with pytest.raises(InputError, match=f"backbone='{backbone}'.*{words}"):
        backbone_policy(backbone)


@pytest.mark.parametrize("name, jitters", [(None, 1), ("rand-m9-mstd0.5", 0)])
def test_auto_augment_takes_the_place_of_colour_jitter(name, jitters):
    policy = POLICIES["imagenet"] if name is None else POLICIES["imagenet"].strong(name)
    assert sum(isinstance(step, T.ColorJitter) for step in build_transform(policy, True).transforms) == jitters


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("cifar", [Fit, T.RandomCrop, T.RandomHorizontalFlip, T.RandomRotation, T.ToTensor, T.Normalize]),
        ("fashion", [Fit, T.RandomCrop, T.RandomHorizontalFlip, T.RandomRotation, T.ToTensor, T.Normalize]),
        ("imagenet", [RandomResizedCrop, T.RandomHorizontalFlip, T.ColorJitter, T.ToTensor, T.Normalize]),
        ("inat", [RandomResizedCrop, T.RandomHorizontalFlip, T.ToTensor, T.Normalize]),
    ],
)
def test_training_transforms_are_the_authors_in_their_order(name, kinds):
    transform = build_transform(name, train=True)
    assert [type(step) for step in transform.transforms] == kinds
    image = Image.fromarray(pixels(50, 50).numpy())
    assert transform(image).shape == (3, POLICIES[name].size, POLICIES[name].size)
    assert build_transform(name, True, input_size=40)(image).shape == (3, 40, 40)


def test_numbers_of_the_policies():
    cifar = build_transform("cifar", train=True).transforms
    assert cifar[1].size == (32, 32) and cifar[1].padding == 4 and cifar[3].degrees == [-15.0, 15.0]
    assert cifar[3].interpolation == T.InterpolationMode.NEAREST and cifar[3].fill == 0
    jitter = build_transform("imagenet", train=True).transforms[2]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("policy", ["imagenet", "inat"])
@pytest.mark.parametrize("train", [True, False])
def test_a_complete_transform_equals_torchvision(policy, train, kind):
    data = encoded(smooth(300, 260), kind)
    transform = build_transform(policy, train, 48)
    plain = [T.RandomResizedCrop(48)] if train else [T.Resize(54), T.CenterCrop(48)]
    torch.manual_seed(3)
    expected = T.Compose([*plain, *transform.transforms[1:]])(plainly(data))
    torch.manual_seed(3)
    assert torch.equal(transform(opened(data)), expected)


# modes and formats as people have them


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "1"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "RGBA"), ("GIF", "P"), ("BMP", "RGB"),
        ("TIFF", "CMYK"), ("TIFF", "1"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGBA"),
        pytest.param("TIFF", "YCbCr", marks=pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 11 and 12 fail")),
    ],
)  # fmt: skip
def test_images_of_every_mode_become_rgb(kind, mode):
    image = smooth(8, 6, mode) if mode in ("LA", "RGBA") else smooth(8, 6).convert(mode)
    data = encoded(image, kind, **(dict(lossless=True, exact=True) if kind == "WEBP" else {}))
    stored = opened(data)
    assert stored.mode == mode or kind == "GIF"
    found = image_set(data)[0][0]
    assert found.size == (8, 6) and difference(found, stored.convert("RGB")).max() == 0
    if kind not in ("JPEG", "GIF"):  # those lose something
        assert difference(found, image.convert("RGB")).max() == 0


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames_is_read(kind):
    first, second = Image.new("RGB", (6, 4), (255, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 255))
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert opened(data).n_frames == 2
    assert np.asarray(image_set(data)[0][0])[0, 0].tolist() == pytest.approx([255, 0, 0], abs=4)


# grayscale of more than 8 bits


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
    assert difference(decode_full(opened(data), lambda w, h: ((0, 0, w, h), (w, h))), image).max() == 0


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


LONG = zlib.compress(bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK))
CHUNKS = {b"zTXt": b"Comment\0\0" + LONG, b"iTXt": b"Comment\0\1\0\0\0" + LONG, b"iCCP": b"profile\0\0" + LONG}


def with_chunk(png: bytes, kind: bytes, content: bytes, before: bytes) -> bytes:
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    at = png.rindex(before) - 4
    return png[:at] + chunk + png[at:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", CHUNKS)
def test_a_png_with_a_text_too_long_for_pillow_has_its_pixels(kind, before, tmp_path):
    image = smooth(20, 30)
    png = with_chunk(encoded(image, "PNG", orientation=6), kind, CHUNKS[kind], before)
    with pytest.raises(ValueError, match="Decompressed data too large"):
        opened(png).load()
    (tmp_path / "text.png").write_bytes(png)
    for source in (png, tmp_path / "text.png"):
        assert difference(upright(open_image(source)), image.rotate(-90, expand=True)).max() == 0
    assert difference(image_set(png)[0][0], image.rotate(-90, expand=True)).max() == 0


def test_a_png_with_too_many_texts_has_its_pixels(monkeypatch):
    png = with_chunk(encoded(smooth(20, 30), "PNG"), b"tEXt", b"Comment\0" + b"x" * 100, b"IDAT")
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 50)
    with pytest.raises(ValueError, match="Too much memory"):
        opened(png)
    assert difference(upright(open_image(png)), smooth(20, 30)).max() == 0


def test_a_png_without_all_its_pixels_is_refused():
    png = with_chunk(encoded(smooth(200, 300), "PNG"), b"zTXt", CHUNKS[b"zTXt"], b"IDAT")
    with pytest.raises(OSError, match="truncated"):
        upright(open_image(png[:-1000]))


def test_eps_is_not_run(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(smooth(20, 30), "EPS"))
    for source in (tmp_path / "photo.jpg", encoded(smooth(20, 30), "EPS")):
        with pytest.raises(OSError, match="EPS is a program, which is not run"):
            open_image(source)


@pytest.mark.parametrize("policy", ["cifar", "imagenet"])
def test_cutout_is_a_black_square_in_training_only(policy):
    strong = POLICIES[policy].strong(None, 8)
    plain, cutting = (build_augment(p, True, 32).transforms for p in (POLICIES[policy], strong))
    assert [type(step) for step in cutting] == [*map(type, plain[:-1]), Cutout, T.Normalize]
    assert [type(step) for step in build_augment(strong, False, 32).transforms] == [T.ToTensor, T.Normalize]
    torch.manual_seed(0)
    areas = {int((Cutout(8)(torch.ones(3, 32, 32)) == 0).sum()) // 3 for _ in range(200)}
    assert max(areas) == 64 and min(areas) < 32
