"""The run folder: a resumable state, plain weights that timm loads, results; and models from wherever they lie."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import __version__
from ..errors import InputError
from ..evaluation.tables import STAGE_NAMES, metrics_table
from ..files import write_atomically, write_text
from ..hardware import device_name
from ..models import Ride, add_class_affine, has_class_affine
from ..models.load import create_ride_model, load_model
from ..models.releases import save_config
from .recipe import Recipe, load_recipe

STAGES = ("experts", "router")


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
        write_text(self.path / "recipe.yaml", recipe.to_yaml())

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the resumable state and the epochs' figures."""
        self._make()
        write_atomically(self.path / "state.pt", lambda partial: torch.save(state, partial))
        if state["history"]:
            text = io.StringIO()
            table = csv.DictWriter(text, list(state["history"][0]), lineterminator="\n")
            table.writeheader()
            table.writerows(state["history"])
            write_text(self.path / "metrics.csv", text.getvalue())

    def write_results(self, recipe: Recipe, device: torch.device, stages: dict[str, Any], **facts: Any) -> None:
        """Write results.json: the figures by stage with all that they depend on; `facts` are further keys."""
        results = dict(recipe=recipe.name, seed=recipe.seed, **provenance(), device=device_name(device))
        results |= dict(precision=recipe.mixed_precision, **facts, stages=stages)
        write_text(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        return json.loads((self.path / "results.json").read_text(encoding="utf-8"))

    def table(self) -> str:
        """The figures of the stages as a plain-text table."""
        return metrics_table({STAGE_NAMES[stage]: metrics for stage, metrics in self.results()["stages"].items()})

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
        write_atomically(self.path / "config.json", lambda p: save_config(model, p, **config))


_ROUTER_KEYS = ("pos_weight", "top_choices_num", "share_expert_help_pred_fc", "threshold")


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
