"""Load a network: a run folder, an authors' checkpoint, the Hub, a timm name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from ..errors import InputError, first_line
from .download import check_network
from .legacy import load_legacy
from .release import check_finite
from .ride import Ride

HUB = "hf-hub:"


def check_path(spec: str | Path) -> None:
    """Raise InputError for a missing path, which timm would take for a Hub name."""
    text = str(spec)
    if "/" in text and ":" not in text and not Path(spec).exists():
        raise InputError(f"model {text!r}: no such folder or file (for a Hub repository write {HUB}owner/name).")


@torch.no_grad()
def check_images(model: nn.Module, image: tuple[int, int, int], name: str) -> Tensor:
    """Run one zero image; InputError if the network does not take such images.

    image: its shape (channels, height, width).
    """
    training = model.training
    try:
        return model.eval()(torch.zeros(1, *image))
    except Exception as error:  # networks raise errors of any type
        size = f"{image[1]} x {image[2]} pixels in {image[0]} channels"
        raise InputError(f"{name} does not take images of {size} ({first_line(error)}).") from error
    finally:
        model.train(training)


def load_any_model(spec: str | Path, **kwargs: Any) -> nn.Module:
    """Load any network in eval mode.

    spec: a run folder, an authors' `.pth`, or a name for `timm.create_model`.
    Raises InputError if it does not exist, or the weights are damaged, do not fit or are not finite.
    """
    path = Path(spec)
    check_path(spec)
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
    except Exception as error:  # of any type: from timm, the Hub's client or torch
        raise InputError(f"model {str(spec)!r} could not be loaded: {first_line(error)}") from error
    if not isinstance(model, Ride):  # those of a Ride are checked where they are read
        check_finite(model.state_dict(), f"model {str(spec)!r}")
    return model.eval()


def load_model(spec: str | Path, **kwargs: Any) -> Ride:
    """Load a RIDE network in eval mode.

    spec: a run folder, an authors' `.pth`, or a name for `timm.create_model`.
    Raises InputError if it does not exist, the weights do not fit, or it is another network.
    """
    if str(spec).startswith(HUB):
        check_network(str(spec).removeprefix(HUB))  # before weights are downloaded
    model = load_any_model(spec, **kwargs)
    if not isinstance(model, Ride):
        raise InputError(f"model {str(spec)!r} is a {type(model).__name__}, expected a network with experts (ride_…).")
    return model


def load_teacher(spec: str | Path, num_classes: int, image: tuple[int, int, int]) -> nn.Module:
    """Load any network in eval mode as the teacher of a student.

    image: the student's input size (channels, height, width). Raises InputError for another number of classes, or if
    the teacher does not take such images, for example because it was made for another size.
    """
    teacher = load_any_model(spec).to(memory_format=torch.channels_last)
    classes = getattr(teacher, "num_classes", num_classes)
    if classes != num_classes:
        raise InputError(f"the teacher {spec} has {classes} classes, the data {num_classes}.")
    logits = check_images(teacher, image, f"the teacher {spec}")
    if getattr(logits, "shape", None) != (1, num_classes):
        raise InputError(f"the teacher {spec} does not return logits of {num_classes} classes.")
    return teacher


def create_ride_model(name: str, size: int | None = None, **kwargs: Any) -> Ride:
    """Create a RIDE network; InputError for an unknown name or argument.

    size: image size, passed on to networks with a fixed one (ViT, Swin).
    """
    if not timm.is_model(name) or not model_entrypoint(name).__module__.startswith("ride_timm."):
        networks = ", ".join(timm.list_models("ride*"))
        raise InputError(f"model={name!r}: not a network with experts; expected one of {networks}.")
    architecture = str(kwargs.get("backbone", name)).partition(".")[0]
    if size is not None and timm.is_model(architecture) and get_pretrained_cfg(architecture).fixed_input_size:
        kwargs["img_size"] = size
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # RuntimeError: an unknown tag
        reason = re.sub(r".*unexpected keyword argument", "it does not take", str(error))
        raise InputError(f"model {name}: {reason}") from error
