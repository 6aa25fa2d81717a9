"""Image files, cut and changed, of every format that Pillow writes."""

import io

import pytest
from encoded_images import image_set, smooth
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged
from PIL import Image, features

from ride_timm import RunError
from ride_timm.data.augment.images import Fit, decode_full, upright
from ride_timm.data.augment.reduced_decode import decode_reduced

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "MPO"]
FORMATS += [kind for kind, module in [("WEBP", "webp"), ("AVIF", "avif")] if features.check(module)]
FORMATS += ["JPEG2000"] if features.check("jpg_2000") else []


def _written(kind: str) -> bytes:
    buffer = io.BytesIO()
    smooth(24, 16).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
@given(draw=st.data())
def test_damaged_images(kind, draw, harmless):
    images = image_set(draw.draw(damaged(_written(kind))))
    for load in (upright, Fit(16, decoder=decode_full), Fit(16, decoder=decode_reduced)):
        with harmless():
            try:
                image, label = images.read(0, load)
            except RunError as error:
                assert "\n" not in str(error)
            else:
                assert isinstance(image, Image.Image) and image.mode == "RGB" and label == 0
