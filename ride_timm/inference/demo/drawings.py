"""Drawings of some classes, as example images of the demo where no photographs may be passed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw

_SIZE = 256
Colour = tuple[int, int, int]


def _gradient(top: Colour, bottom: Colour) -> Image.Image:
    mask = Image.linear_gradient("L").resize((_SIZE, _SIZE))
    return Image.composite(Image.new("RGB", mask.size, bottom), Image.new("RGB", mask.size, top), mask)


def _point(angle: float, radius: float) -> tuple[float, float]:
    """On a circle around the centre; the angle in turns, clockwise from the top."""
    return _SIZE / 2 + radius * sin(2 * pi * angle), _SIZE / 2 - radius * cos(2 * pi * angle)


def _airplane() -> Image.Image:
    image = _gradient((80, 140, 215), (190, 215, 240))
    draw = ImageDraw.Draw(image)
    draw.ellipse((25, 112, 232, 142), fill=(240, 242, 245))
    draw.polygon([(105, 128), (150, 128), (95, 215), (75, 215)], fill=(190, 195, 205))
    draw.polygon([(110, 122), (150, 122), (120, 60), (100, 60)], fill=(205, 210, 218))
    draw.polygon([(30, 122), (60, 122), (38, 78), (22, 78)], fill=(200, 60, 60))
    return image


def _apple() -> Image.Image:
    image = _gradient((240, 240, 240), (205, 205, 205))
    draw = ImageDraw.Draw(image)
    draw.ellipse((52, 70, 160, 215), fill=(190, 25, 30))
    draw.ellipse((96, 70, 204, 215), fill=(200, 30, 35))
    draw.ellipse((75, 90, 110, 130), fill=(235, 110, 105))
    draw.line((128, 88, 140, 40), fill=(90, 60, 30), width=9)
    return image


def _bottle() -> Image.Image:
    image = _gradient((245, 245, 245), (215, 215, 215))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((92, 100, 164, 246), 14, fill=(40, 95, 50))
    draw.rectangle((114, 30, 142, 104), fill=(40, 95, 50))
    draw.rectangle((112, 18, 144, 36), fill=(150, 30, 30))
    draw.rectangle((92, 150, 164, 205), fill=(235, 225, 190))
    return image


def _clock() -> Image.Image:
    image = _gradient((200, 200, 205), (170, 170, 175))
    draw = ImageDraw.Draw(image)
    draw.ellipse((28, 28, 228, 228), fill=(250, 250, 245), outline=(30, 30, 35), width=14)
    for hour in range(12):
        draw.line((_point(hour / 12, 74), _point(hour / 12, 86)), fill=(20, 20, 20), width=7)
    draw.line((_point(0, 0), _point(0, 66)), fill=(20, 20, 20), width=8)
    draw.line((_point(0, 0), _point(4 / 12, 50)), fill=(20, 20, 20), width=10)
    return image


def _orange() -> Image.Image:
    image = _gradient((250, 250, 250), (220, 220, 220))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 40, 216, 216), fill=(245, 140, 20))
    draw.ellipse((75, 65, 130, 110), fill=(255, 190, 90))
    draw.ellipse((120, 118, 134, 132), fill=(90, 110, 40))
    return image


def _ship() -> Image.Image:
    image = _gradient((120, 170, 225), (220, 235, 245))
    image.paste(_gradient((40, 110, 160), (15, 60, 100)).resize((_SIZE, 130)), (0, 126))
    draw = ImageDraw.Draw(image)
    draw.polygon([(25, 128), (232, 128), (205, 172), (55, 172)], fill=(150, 40, 40))
    draw.rectangle((70, 92, 185, 128), fill=(240, 240, 240))
    draw.rectangle((120, 52, 145, 92), fill=(200, 60, 50))
    return image


def _sunflower() -> Image.Image:
    image = _gradient((60, 110, 60), (40, 80, 40))
    draw = ImageDraw.Draw(image)
    for length, shift, colour in ((112, 0.0, (245, 190, 10)), (100, 0.5, (255, 210, 30))):
        for petal in range(20):
            angle = (petal + shift) / 20
            draw.polygon([_point(angle - 0.035, 55), _point(angle, length), _point(angle + 0.035, 55)], fill=colour)
    draw.ellipse((70, 70, 186, 186), fill=(85, 50, 20))
    draw.ellipse((92, 92, 164, 164), fill=(60, 35, 15))
    return image


DRAWINGS: dict[str, Callable[[], Image.Image]] = dict(
    airplane=_airplane,
    apple=_apple,
    bottle=_bottle,
    clock=_clock,
    orange=_orange,
    ship=_ship,
    sunflower=_sunflower,
)


def write_drawings(labels: Iterable[str], folder: Path) -> list[Path]:
    """Write drawings of those classes that have one, such as of CIFAR-10 and CIFAR-100."""
    paths = []
    for name in sorted(DRAWINGS.keys() & set(labels)):
        paths.append(folder / f"{name}.png")
        DRAWINGS[name]().save(paths[-1])
    return paths
