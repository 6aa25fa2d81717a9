"""Load a network from a run folder, an authors' checkpoint, the Hub, or any name timm knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from ..errors import InputError, first_line
from .legacy import load_legacy
from .releases import check_network
from .ride import Ride

_HUB = "hf-hub:"


def check_place(spec: str | Path) -> None:
    """InputError for a path that leads nowhere, which timm would take for a name of the Hub."""
    text = str(spec)
    if "/" in text and ":" not in text and not Path(spec).exists():
        raise InputError(
            f"model {text!r}: there is no such folder or file (a repository of the Hub is {_HUB}owner/name)."
        )


@torch.no_grad()
def check_images(model: nn.Module, image: tuple[int, int, int], name: str) -> Tensor:
    """The logits of one zero image; InputError where a network does not take such images (channels and sides)."""
    training = model.training
    try:
        return model.eval()(torch.zeros(1, *image))
    except Exception as error:  # networks refuse images by whatever they like
        size = f"{image[1]} x {image[2]} pixels in {image[0]} channels"
        raise InputError(f"{name} does not take images of {size} ({first_line(error)}).") from error
    finally:
        model.train(training)


def load_any_model(spec: str | Path, **kwargs: Any) -> nn.Module:
    """A network in eval mode, ours or timm's own, from a run folder, an authors' `.pth`, or what timm creates.

    A teacher may be any such network. InputError where nothing is found there or the weights do not fit.
    """
    path = Path(spec)
    check_place(spec)
    try:
        if path.is_file():
            model = load_legacy(path)
        elif path.is_dir():
            if not (path / "config.json").is_file():
                raise InputError(f"{path} holds no config.json: not a run folder, or its first stage is not finished.")
            model = timm.create_model(f"local-dir:{path}", pretrained=True, **kwargs)
        else:
            model = timm.create_model(str(spec), pretrained=True, **kwargs)
    except InputError:
        raise
    except Exception as error:  # timm, the Hub's client and torch raise what they like
        raise InputError(f"model {str(spec)!r} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.eval()


def load_model(spec: str | Path, **kwargs: Any) -> Ride:
    """A model in eval mode from a run folder, an authors' `.pth`, or anything `timm.create_model` takes.

    InputError where nothing is found there, the weights do not fit, or the model is none of ours.
    """
    if str(spec).startswith(_HUB):
        check_network(str(spec).removeprefix(_HUB))  # before any weights are fetched
    model = load_any_model(spec, **kwargs)
    if not isinstance(model, Ride):
        raise InputError(f"model {str(spec)!r} is a {type(model).__name__}, expected one with experts (ride_…).")
    return model


def load_teacher(spec: str | Path, num_classes: int, image: tuple[int, int, int]) -> nn.Module:
    """A network in eval mode from wherever `load_any_model` finds it, that answers to the student's images.

    image: channels and sides of one. InputError for other classes than `num_classes`, or a network that does not take
    such images, as one made for another size.
    """
    teacher = load_any_model(spec)
    classes = getattr(teacher, "num_classes", num_classes)
    if classes != num_classes:
        raise InputError(f"the teacher {spec} has {classes} classes, the data {num_classes}.")
    logits = check_images(teacher, image, f"the teacher {spec}")
    if getattr(logits, "shape", None) != (1, num_classes):
        raise InputError(f"the teacher {spec} gives no logits of {num_classes} classes for an image.")
    return teacher


def create_ride_model(name: str, size: int | None = None, **kwargs: Any) -> Ride:
    """`timm.create_model` for our networks; InputError for a name or an argument that they do not know.

    size: side of the images; networks that are made for one side (ViT, Swin) are made for this one.
    """
    if not timm.is_model(name) or not model_entrypoint(name).__module__.startswith("ride_timm."):
        raise InputError(f"model={name!r}: no network with experts; there are {', '.join(timm.list_models('ride*'))}.")
    architecture = str(kwargs.get("backbone", name)).partition(".")[0]
    if size is not None and timm.is_model(architecture) and get_pretrained_cfg(architecture).fixed_input_size:
        kwargs["img_size"] = size
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        reason = re.sub(r".*unexpected keyword argument", "it does not take", str(error))
        raise InputError(f"model {name}: {reason}") from error
