"""Reduced decoding: large JPEGs at 1/2, 1/4 or 1/8 of their size.

The plan is made before decoding, in pixels of the full, upright image, so random crops draw the same boxes either way.
"""

from __future__ import annotations

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from .images import Box, Plan, decode_full, resize_box, upright, upright_size

_FACTORS = (8, 4, 2)
# EXIF orientations that mirror the upright image's x or y
_X_MIRRORED, _Y_MIRRORED = (2, 3, 6, 7), (3, 4, 7, 8)


def reduction(box: Box, size: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 that divides the box to at least `size`."""
    left, top, right, bottom = box
    enough = (n for n in _FACTORS if right - left >= n * size[0] and bottom - top >= n * size[1])
    return next(enough, 1)


def decode_reduced(image: Image.Image, plan: Plan) -> Image.Image:
    """The planned box of an image, decoded no larger than the box needs.

    Close to the pixels of `decode_full`, and equal to them where nothing is reduced. Raises what Pillow raises.
    """
    if not isinstance(image, JpegImageFile):  # only JPEG headers surely state size and orientation before decoding
        return decode_full(image, plan)

    orientation = image.getexif().get(ExifTags.Base.Orientation)
    stored = image.size
    width, height = upright_size(image)
    box, size, resampling = plan(width, height)
    factor = reduction(box, size)
    # draft takes a size and chooses the factor by itself; for this size it chooses ours
    if factor > 1 and image.draft(None, (stored[0] // factor, stored[1] // factor)) is None:
        factor = 1  # decoded already
    image = upright(image)
    # The last pixel of a row may cover less than `factor` pixels of the file; mirrored, it is the first.
    x = image.width - width / factor if orientation in _X_MIRRORED else 0
    y = image.height - height / factor if orientation in _Y_MIRRORED else 0
    left, top, right, bottom = (edge / factor for edge in box)
    return resize_box(image, (left + x, top + y, right + x, bottom + y), size, resampling)
