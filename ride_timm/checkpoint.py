"""The run folder: a resumable state, plain weights that timm loads, results; and models from wherever they lie."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from . import __version__
from .errors import InputError, RunError, first_line
from .metrics import format_table
from .models import Ride, add_class_affine, has_class_affine, load_legacy
from .models.releases import check_network
from .processor import device_name
from .recipe import Recipe, load_recipe

STAGES = ("experts", "router")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: a reader sees the old file or the new one, whole.

    RunError where the disk does not take it; the old file then still stands.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors wrap a full disk
        message = f"{path} could not be written, is the disk full? What stood there before still does. ({error})"
        raise RunError(message) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


class RunFolder:
    """One run's folder.

    recipe.yaml (as run), state.pt (resumable, epoch by epoch), metrics.csv, results.json, config.json and
    model.safetensors (plain weights that `timm.create_model("local-dir:…")` loads).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def occupied(self) -> bool:
        """Whether a run has been started here."""
        return (self.path / "recipe.yaml").is_file()

    def recipe(self) -> Recipe:
        """The recipe as it was run."""
        return load_recipe(self.path / "recipe.yaml")

    def state(self) -> dict[str, Any] | None:
        """The state after the last finished epoch, or None where none is finished."""
        path = self.path / "state.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{path} is not a readable state ({str(error).splitlines()[0]}).") from error

    def _only_begun(self) -> bool:
        """Whether all that stands in the folder, which has no recipe, is what a run writes before its first step."""
        if {path.name for path in self.path.iterdir()} - {"state.pt", ".state.pt.partial", ".recipe.yaml.partial"}:
            return False
        state = self.state()
        return state is None or not (state["epoch"] or state["stages"])

    def check_state(self, state: dict[str, Any] | None) -> None:
        """InputError where a run that has weights already would begin again, as its state is gone."""
        if state is None and (self.path / "model.safetensors").exists():
            raise InputError(
                f"{self.path} holds a run without its state.pt, so there is nothing to go on from: choose another "
                "--output, or delete the folder to begin again."
            )

    def claim(self, recipe: Recipe, stage: str, resume: bool, from_here: bool) -> dict[str, Any] | None:
        """Check that this run may be made here, without writing; gives the state to go on from, if any.

        stage: "both", "experts" or "router"; from_here: the router is to be trained on this folder's experts.
        InputError where another run stands here, or the recipe disagrees with the one to go on with.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file: name a folder.")
        state = self.state() if self.occupied else None
        finished = state is not None and "experts" in state["stages"]
        add_router = from_here and finished and state["stage"] == "router" and state["epoch"] == 0
        if from_here and not resume and not add_router and not self.occupied:
            raise InputError(
                f"no stage one to start from: {self.path} holds no run. Name one by --from, or train it first."
            )
        if self.occupied and not resume and not add_router:
            raise InputError(
                f"output {self.path} already holds a run: go on with it by --resume, or choose another --output."
            )
        if self.occupied:
            theirs = self.recipe()
            keys = recipe.differing(theirs)
            if add_router and not resume:
                keys = [key for key in keys if not key.startswith("router_") and key not in _ROUTER_KEYS]
            if keys:
                differences = ", ".join(f"{key} ({getattr(theirs, key)!r} there)" for key in keys)
                raise InputError(
                    f"the recipe disagrees with the run in {self.path}: {differences}. Leave --recipe and these keys "
                    "out to go on as the run began, or choose another --output."
                )
        elif self.path.is_dir() and not self._only_begun():
            raise InputError(f"output {self.path} is not empty and holds no run: choose another --output.")
        routing = resume and state is not None and state["stage"] == "router"
        if state is not None and state["stage"] != "experts" and not finished and stage != "router":
            raise InputError(f"{self.path} holds a router on experts from elsewhere: go on by --stage router --resume.")
        if from_here and not finished and not routing:
            raise InputError(f"stage one in {self.path} is not finished: resume it by --resume --stage both.")
        return state

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {self.path} cannot be made ({error.strerror}).") from error

    def start(self, recipe: Recipe) -> None:
        """Write down the recipe, after a first state: where a recipe stands there is something to go on from."""
        self._make()
        _write_text(self.path / "recipe.yaml", recipe.to_yaml())

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the resumable state and the epochs' figures."""
        self._make()
        write_atomically(self.path / "state.pt", lambda partial: torch.save(state, partial))
        if state["history"]:
            text = io.StringIO()
            table = csv.DictWriter(text, list(state["history"][0]), lineterminator="\n")
            table.writeheader()
            table.writerows(state["history"])
            _write_text(self.path / "metrics.csv", text.getvalue())

    def write_results(self, recipe: Recipe, device: torch.device, stages: dict[str, Any], **facts: Any) -> None:
        """Write results.json: the figures by stage with all that they depend on; `facts` are further keys."""
        results = dict(recipe=recipe.name, seed=recipe.seed, **provenance(), device=device_name(device))
        results |= dict(precision=recipe.mixed_precision, **facts, stages=stages)
        _write_text(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        return json.loads((self.path / "results.json").read_text(encoding="utf-8"))

    def table(self) -> str:
        """The figures of the stages as a plain-text table."""
        names = {"experts": "ensemble", "router": "routed"}
        return format_table({names[stage]: metrics for stage, metrics in self.results()["stages"].items()})

    def export(self, model: Ride, data_config: dict[str, Any], class_names: tuple[str, ...]) -> None:
        """Plain weights and timm's config.json; `data_config`: input_size, mean, std, crop_pct of the test images."""
        tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        # the weights beside it are whole: loading them again needs no others
        backbone = dict(backbone_pretrained=False) if "backbone" in model._model_args else {}
        config = dict(
            model_config=dict(label_names=list(class_names)),
            model_args=dict(num_experts=model.num_experts) | backbone,
            data_config=data_config,
        )
        write_atomically(
            self.path / "model.safetensors", lambda p: safetensors.torch.save_file(tensors, p, {"format": "pt"})
        )
        write_atomically(self.path / "config.json", lambda p: save_config_for_hf(model, str(p), **config))


_ROUTER_KEYS = ("pos_weight", "top_choices_num", "share_expert_help_pred_fc", "threshold")


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
    if not timm.is_model(name) or not model_entrypoint(name).__module__.startswith(__package__):
        raise InputError(f"model={name!r}: no network with experts; there are {', '.join(timm.list_models('ride*'))}.")
    architecture = str(kwargs.get("backbone", name)).partition(".")[0]
    if size is not None and timm.is_model(architecture) and get_pretrained_cfg(architecture).fixed_input_size:
        kwargs["img_size"] = size
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        reason = re.sub(r".*unexpected keyword argument", "it does not take", str(error))
        raise InputError(f"model {name}: {reason}") from error


def create_model(recipe: Recipe, num_classes: int, source: str | None = None, size: int | None = None) -> Ride:
    """The recipe's network without a router, from its seed, or with the trunk and experts of `source`.

    InputError for an argument that the network does not take, or weights of another one.
    """
    torch.manual_seed(recipe.seed)
    model = create_ride_model(recipe.model, size, num_classes=num_classes, router=False, **recipe.model_args)
    if source is not None:
        loaded = load_model(source)
        weights = loaded.state_dict()
        if has_class_affine(loaded):
            add_class_affine(model)
        try:
            model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("router.")})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{source} holds another model than the recipe's {recipe.model}: {reason}") from error
    return model.to(memory_format=torch.channels_last)


def provenance() -> dict[str, Any]:
    """Commit of the checkout that runs (None outside one) and versions of what the numbers depend on."""
    packages = ("torch", "timm", "accelerate", "datasets", "numpy")
    here = Path(__file__).parent
    try:
        inside = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        known = inside.returncode == 0 and commit.returncode == 0
    except OSError:
        known = False
    # not `version("ride-timm")`: a clone runs without being installed
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"commit": commit.stdout.strip() if known else None, "versions": versions | {"ride-timm": __version__}}
