"""Transforms of single images: decode, crop, augment, normalise."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from math import ceil, floor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms as T
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F

from .auto_augment import AutoAugment
from .policies import Policy, get_policy

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Planned(NamedTuple):
    """A box of the full, upright image, and (width, height) to resize it to."""

    box: Box
    size: tuple[int, int]
    resampling: Image.Resampling = Image.Resampling.BILINEAR


Plan = Callable[[int, int], Planned]  # from (width, height) of the full, upright image
# Decodes the planned box of an image, resized: (image as opened, plan) -> RGB image of the planned size
Decoder = Callable[[Image.Image, Plan], Image.Image]

_SIXTEEN_BITS = ("PNG", "PPM")  # formats of at most 16 bits, which some releases of Pillow open as 32: mode "I"

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")  # chunks whose unpacked size Pillow limits; pixels do not need them


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open an image without decoding it, given its path or its bytes.

    A PNG whose texts exceed Pillow's limits is opened without them. Raises what Pillow raises, and `OSError` for EPS,
    under any extension: Ghostscript would run the program that it is.
    """
    try:
        image = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        if image.format == "EPS":
            raise OSError("EPS is a program, which is not run; save the image as PNG")
        return image
    except ValueError:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data.startswith(_PNG):
            raise
        return Image.open(BytesIO(_without_texts(data)))


def _without_texts(png: bytes) -> bytes:
    kept, start = [_PNG], len(_PNG)
    while start < len(png):
        stop = start + 12 + int.from_bytes(png[start : start + 4], "big")  # length, kind, content, checksum
        if png[start + 4 : start + 8] not in _PNG_TEXTS:
            kept.append(png[start:stop])
        start = stop
    return b"".join(kept)


def _load(image: Image.Image) -> None:
    """Decode an image; texts that exceed Pillow's limits may also follow the pixels of a PNG."""
    try:
        image.load()
    except ValueError:
        if image.format != "PNG" or image.tile:  # type: ignore[attr-defined]  # tiles are left: pixels are missing
            raise


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image once its EXIF orientation is applied; nothing is decoded."""
    width, height = image.size
    sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if sideways else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """Decode an image, apply its EXIF orientation and convert it to RGB.

    16-bit grayscale is scaled to 8 bits, where Pillow would clip it at 255 and make it white. Raises `OSError`, as for
    corrupt images, for wider pixels, whose range the file does not state.
    """
    _load(image)
    kind = image.format  # the transposed image has none
    if ExifTags.Base.Orientation in image.getexif():
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else _eight_bits(image, kind).convert("RGB")


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BITS):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # 65535 / 255
    if image.mode == "I":
        pixels = np.asarray(image)  # 8-bit integers are often stored in 32 bits, as by `datasets` from int64
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 255:
            raise OSError(f"pixels of mode I from {low} to {high} have no known range; save it with 8 or 16 bits")
    if image.mode == "F":
        raise OSError("pixels of mode F have no known range; save it with 8 or 16 bits")
    return image


def decode_full(image: Image.Image, plan: Plan) -> Image.Image:
    """The planned box of an image, with torchvision's pixels bit for bit.

    Raises what Pillow raises.
    """
    image = upright(image)
    return resize_box(image, *plan(*image.size))


def resize_box(
    image: Image.Image, box: Box, size: tuple[int, int], interpolation: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Resize a box, with antialiasing.

    It is cropped first, as in torchvision: pixels around it do not bleed in.
    """
    left, top, right, bottom = box
    outer = floor(left), floor(top), ceil(right), ceil(bottom)
    if outer != (0, 0, *image.size):
        image = image.crop(outer)
    inner = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
    return image.resize(size, interpolation, inner)


class Fit:
    """Resize the shorter image size to `resize`, or the image to a square for `squash`; crop the centre to `size`."""

    def __init__(
        self,
        size: int,
        resize: int | None = None,
        decoder: Decoder = decode_full,
        interpolation: str = "bilinear",
        squash: bool = False,
    ) -> None:
        self.resize, self.decoder, self.squash = resize or size, decoder, squash
        self.resampling = Image.Resampling[interpolation.upper()]
        self.crop = T.CenterCrop(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.crop(self.resized(image))

    def resized(self, image: Image.Image) -> Image.Image:
        """The image before the crop."""
        return self.decoder(image, self.plan)

    def plan(self, width: int, height: int) -> Planned:
        """The full image, and the size that torchvision's Resize gives it."""
        short = (width, height) if self.squash else (min(width, height),) * 2
        size = int(self.resize * width / short[0]), int(self.resize * height / short[1])
        return Planned((0, 0, width, height), size, self.resampling)


class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's random resized crop, planned before the image is decoded.

    So all decoders crop the same boxes.
    """

    def __init__(self, size: int, decoder: Decoder = decode_full, interpolation: str = "bilinear") -> None:
        super().__init__(size)
        self.resampling = Image.Resampling[interpolation.upper()]
        self.decoder = decoder

    def forward(self, image: Image.Image) -> Image.Image:
        return self.decoder(image, self.plan)

    def plan(self, width: int, height: int) -> Planned:
        """A random box, and the output size."""
        shape = torch.empty(height, width, device="meta")  # get_params reads the size alone
        top, left, h, w = self.get_params(shape, self.scale, self.ratio)
        return Planned((left, top, left + w, top + h), (self.size[1], self.size[0]), self.resampling)


class TensorCrop(RandomResizedCrop):
    """The same random boxes, resized by torch: undecoded image -> uint8 [3, S, S].

    Plain colour JPEGs take half the time after decoding; pixels differ from Pillow's by rounding, at most 1 of 255 for
    bilinear and 4 for bicubic. Other images are cropped by Pillow. Raises what Pillow and torchvision raise.
    """

    def forward(self, image: Image.Image) -> Tensor:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if type(image) is not JpegImageFile or image.mode != "RGB" or turned or image.fp is None:  # decoded already
            return F.pil_to_tensor(super().forward(image))
        (left, top, right, bottom), size, resampling = self.plan(*image.size)
        image.fp.seek(0)  # Pillow has read the header
        pixels = decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), ImageReadMode.RGB)
        box = pixels[None, :, int(top) : int(bottom), int(left) : int(right)]
        return interpolate(box, size[::-1], mode=resampling.name.lower(), antialias=True)[0]


class Cutout:
    """A black square of `length` pixels at a random place, which may reach over the border: [3, S, S] -> [3, S, S].

    DeVries and Taylor 2017, arXiv:1708.04552.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        top, left = (int(torch.randint(size, ())) - self.length // 2 for size in image.shape[-2:])
        image[:, max(0, top) : max(0, top + self.length), max(0, left) : max(0, left + self.length)] = 0
        return image


def build_crop(
    policy: str | Policy, train: bool, input_size: int | None = None, decoder: Decoder = decode_full
) -> Fit | RandomResizedCrop:
    """The first step of a transform: undecoded PIL image -> RGB image [S, S]."""
    policy = get_policy(policy)
    size = policy.input_size(input_size)
    if not train:
        return Fit(size, policy.resize_at(size), decoder, policy.interpolation, policy.squash)
    if policy.padding is not None:
        return Fit(size, decoder=decoder)
    return RandomResizedCrop(size, decoder, policy.interpolation)


def _changes(policy: Policy, train: bool, input_size: int | None) -> list[Callable[[Image.Image], Image.Image]]:
    """The steps between crop and tensor: RGB PIL image [S, S] -> RGB PIL image [S, S]."""
    if not train:
        return []
    size, changes = policy.input_size(input_size), []
    if policy.auto_augment is not None:
        changes = [AutoAugment(policy.auto_augment, size, policy.mean)]
    if policy.padding is not None:
        steps = [*changes, T.RandomCrop(size, padding=policy.padding), T.RandomHorizontalFlip()]
    else:
        steps = [T.RandomHorizontalFlip(), *changes]
    steps += [T.RandomRotation(policy.rotation)] if policy.rotation else []
    if policy.jitter and policy.auto_augment is None:
        steps.append(T.ColorJitter(policy.jitter, policy.jitter, policy.jitter))
    return steps


def build_augment(policy: str | Policy, train: bool, input_size: int | None = None) -> T.Compose:
    """The steps after the crop: RGB PIL image [S, S] -> normalised float32 [3, S, S]."""
    policy = get_policy(policy)
    cut = [Cutout(policy.cutout)] if train and policy.cutout else []
    return T.Compose([*_changes(policy, train, input_size), T.ToTensor(), *cut, T.Normalize(policy.mean, policy.std)])


class View:
    """The steps after the crop, to whole pixels: RGB PIL image [S, S] -> uint8 [3, S, S].

    jitter: the colour jitter, which is left to the batch; Cutout must follow it, so it is applied here with Cutout.
    only_flips: no step needs Pillow, so the image may be uint8 [3, S, S].
    """

    def __init__(self, policy: Policy, train: bool, input_size: int | None = None) -> None:
        steps, self.jitter = _changes(policy, train, input_size), None
        if not policy.cutout and steps and isinstance(steps[-1], T.ColorJitter):
            self.jitter = steps.pop()
        self.only_flips = all(isinstance(step, T.RandomHorizontalFlip) for step in steps)
        self.changes = T.Compose(steps)
        self.cut = Cutout(policy.cutout) if train and policy.cutout else None

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        image = self.changes(image)
        pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        return self.cut(pixels.clone()) if self.cut else pixels  # views share a crop


def build_transform(
    policy: str | Policy, train: bool, input_size: int | None = None, decoder: Decoder = decode_full
) -> T.Compose:
    """The complete transform of an image: PIL image -> normalised float32 [3, S, S].

    S is `input_size`, or the policy's size. Random choices come from torch's global generator, as torchvision's do.
    """
    crop = build_crop(policy, train, input_size, decoder)
    return T.Compose([crop, *build_augment(policy, train, input_size).transforms])
