"""Decoding no more of an image than its use needs: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that serves.

A use is a plan: told the size of the image, it answers with a box of it and the size to resize that box to. The plan
is asked before anything is decoded, and always in pixels of the full, upright image, so a random plan draws the same
box whether or not the decoding is reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

Box = tuple[float, float, float, float]  # left, top, right, bottom
Plan = Callable[[int, int], tuple[Box, tuple[int, int]]]  # width, height -> box, (width, height) of the result

_FACTORS = (8, 4, 2)  # what libjpeg decodes to at less cost, by leaving out frequencies
_SIXTEEN_BITS = ("PNG", "PPM")  # formats of at most 16 bits, which some releases of Pillow open as 32: mode "I"
# EXIF orientations that exchange width and height, and those that mirror the upright image's x or y
_SIDEWAYS, _X_MIRRORED, _Y_MIRRORED = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


def upright(image: Image.Image) -> Image.Image:
    """The image decoded, turned as its EXIF orientation says, and in RGB: what `datasets` makes of it, in RGB.

    Grey of 16 bits is scaled to 8, where Pillow would cut it off at 255 and so make it white. Raises `OSError`, as for
    what cannot be decoded, for wider pixels, whose black and white nothing in the file tells.
    """
    image.load()
    kind = image.format  # the turned image has none
    if ExifTags.Base.Orientation in image.getexif():
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else _eight_bits(image, kind).convert("RGB")


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BITS):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # 65535 / 255
    if image.mode == "I":
        low, high = image.getextrema()  # integers of 8 bits are often stored so, as by `datasets` from int64
        if low < 0 or high > 255:
            raise OSError(f"pixels of mode I from {low} to {high} have no known range; save it with 8 or 16 bits")
    if image.mode == "F":
        raise OSError("pixels of mode F have no known range; save it with 8 or 16 bits")
    return image


def reduction(box: Box, size: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 to divide the box by that leaves it no smaller than `size` (width, height)."""
    left, top, right, bottom = box
    enough = (n for n in _FACTORS if right - left >= n * size[0] and bottom - top >= n * size[1])
    return next(enough, 1)


def read_resized(image: Image.Image, plan: Plan, reduced: bool = True) -> Image.Image:
    """The planned box of an image, resized with antialiasing: RGB, of the planned size.

    image: as `PIL.Image.open` gives it, not yet decoded if time is to be saved; a decoded one serves as well.
    reduced: False decodes every image in full.

    The pixels are those of torchvision's crop and resize, bit for bit unless the decoding is reduced. Raises what
    Pillow raises for an image that cannot be decoded.
    """
    if not (reduced and isinstance(image, JpegImageFile)):  # only a JPEG's header is sure to tell all without decoding
        image = upright(image)
        return _resize(image, *plan(*image.size))

    orientation = image.getexif().get(ExifTags.Base.Orientation)
    stored = image.size
    width, height = stored[::-1] if orientation in _SIDEWAYS else stored
    box, size = plan(width, height)
    factor = reduction(box, size)
    # draft takes a size and chooses the factor by itself; for this size it chooses ours
    if factor > 1 and image.draft(None, (stored[0] // factor, stored[1] // factor)) is None:
        factor = 1  # decoded already
    image = upright(image)
    # The last pixel of a line may stand for less than `factor` pixels of the file; mirrored, it is the first.
    x = image.width - width / factor if orientation in _X_MIRRORED else 0
    y = image.height - height / factor if orientation in _Y_MIRRORED else 0
    left, top, right, bottom = (edge / factor for edge in box)
    return _resize(image, (left + x, top + y, right + x, bottom + y), size)


def _resize(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """Resize a box. As in torchvision, it is cut out first: the pixels around it do not bleed in."""
    left, top, right, bottom = box
    outer = floor(left), floor(top), ceil(right), ceil(bottom)
    if outer != (0, 0, *image.size):
        image = image.crop(outer)
    inner = left - outer[0], top - outer[1], right - outer[0], bottom - outer[1]
    return image.resize(size, Image.Resampling.BILINEAR, inner)
