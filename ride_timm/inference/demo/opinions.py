"""Predictions that the demo shows: the ensemble, each expert, and the router at a threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from ...errors import InputError, first_line
from ...evaluation.macs import Macs, count_macs
from ...evaluation.routing_curve import Point
from ...evaluation.tables import GROUPS, ensemble_metrics
from ...hardware import choose_device
from ...models import Ride
from ...models.load import HUB
from ...models.release import class_names
from ..image_files import ImageFiles
from ..load import check_channels, load_ride, own_recipe, run_file
from ..model_prior import run_results

TOP, OWN = 5, 3  # classes shown of the ensemble, and of each expert
FORMATS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
_EVERY = 20  # thresholds offered, besides 1, where no curve was measured


@dataclass(frozen=True)
class Candidate:
    """A class and its probability; train_images: None where unknown."""

    label: str
    probability: float
    train_images: int | None


@dataclass(frozen=True)
class Routed:
    """The prediction of the experts that the router used.

    macs: of this image, gates included; saved: the fraction of the ensemble's MACs, negative where all experts and the
    gates ran.
    """

    best: Candidate
    experts_used: int
    macs: float
    saved: float


@dataclass(frozen=True)
class Opinions:
    """The most probable classes of the ensemble and of each expert; routed: None without a router."""

    ensemble: tuple[Candidate, ...]
    experts: tuple[tuple[Candidate, ...], ...]
    routed: Routed | None


@dataclass(frozen=True)
class Demo:
    """A model and what its results state of it.

    labels, train_images [C]: the latter empty where unknown; settings: points of the router's curve, the cheapest
    first, with None for what was not measured; empty without a router. default: index of the model's own setting;
    accuracy: of the ensemble on the test set, in percent; dataset: as in recipes; examples: the release's images.
    """

    name: str
    model: Ride
    labels: tuple[str, ...]
    train_images: tuple[int, ...]
    macs: Macs
    settings: tuple[Point, ...]
    default: int
    accuracy: float | None = None
    dataset: str | None = None
    examples: tuple[Path, ...] = ()

    @cached_property
    def _transform(self) -> Callable[[Image], Tensor]:
        return create_transform(**resolve_model_data_config(self.model), is_training=False)

    @torch.inference_mode()
    def predict(self, path: str | Path, threshold: float = 0.5) -> Opinions:
        """Opinions on an image file; InputError for a file that cannot be read as an image."""
        image = self._read(Path(path))[None].to(next(self.model.parameters()).device)
        features, logits = self.model.forward_experts(image)  # [1, E, D], [1, E, C]
        routed = None
        if self.model.router is not None:
            gates = self.model.router(features, logits).sigmoid()[0]  # [E-1]
            used = 1 + int((gates > threshold).cumprod(0).sum())
            routed = self._routed(logits[0, :used].mean(0), used)
        ensemble = self._candidates(logits[0].mean(0), TOP)
        return Opinions(ensemble, tuple(self._candidates(own, OWN) for own in logits[0]), routed)

    def _read(self, path: Path) -> Tensor:
        image = ImageFiles([str(path)], self._transform, self.model.in_chans == 1)[0]
        if isinstance(image, str):
            reason = image.split(": ", 1)[-1].replace(str(path), path.name)  # without class and path on the server
            raise InputError(f"{path.name} cannot be read as an image ({reason}): expected {FORMATS}.")
        return image

    def _candidates(self, logits: Tensor, most: int) -> tuple[Candidate, ...]:
        values, indices = logits.float().softmax(0).topk(min(most, len(logits)))
        counts = self.train_images
        return tuple(
            Candidate(self.labels[i], p, counts[i] if counts else None)
            for p, i in zip(values.tolist(), indices.tolist(), strict=True)
        )

    def _routed(self, logits: Tensor, used: int) -> Routed:
        macs = self.macs.expected([float(i + 1 == used) for i in range(self.model.num_experts)])
        return Routed(self._candidates(logits, 1)[0], used, macs, 1 - macs / self.macs.ensemble)


def load_demo(spec: str, device: str | None = None) -> Demo:
    """Load a model for the demo, with the results of its run or release.

    device: such as "cpu", by default the GPU where there is one. InputError for a model that cannot be loaded or takes
    no image files, and for damaged results.
    """
    chosen = choose_device(device)
    model = load_ride(spec, routed=False)
    check_channels(model, spec)
    recipe = own_recipe(spec)
    try:
        results, examples = _results(spec, model)
        stages, data = results.get("stages", {}), results.get("data", {})
        counts = tuple(map(int, results.get("class_counts") or ()))
        if len(counts) not in (0, model.num_classes):
            raise ValueError(f"{len(counts)} class counts")
        settings, default = _settings(results) if model.router is not None else ((), 0)
        accuracy = _number(ensemble_metrics(stages).get("all"))
        dataset = data.get("dataset", recipe and recipe.dataset)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{spec}: its results.json is damaged ({first_line(error)}): copy it again.") from error
    return Demo(
        name=Path(spec.removeprefix("hf-hub:").removeprefix("local-dir:")).resolve().name,
        macs=count_macs(model, tuple(model.pretrained_cfg["input_size"])),
        model=model.to(chosen),
        labels=tuple(class_names(model)),
        train_images=counts,
        settings=settings,
        default=default,
        accuracy=accuracy,
        dataset=dataset,
        examples=examples,
    )


def _results(spec: str, model: Ride) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """results.json of a run or release and its example images, in a folder or on the Hub; empty where it has none."""
    repository = model.pretrained_cfg.get("hf_hub_id")  # of a tag, too
    where = f"{HUB}{repository}" if repository else spec
    results = run_results(where)
    paths = [run_file(where, Path(str(example["file"])).name) for example in results.get("examples", ())]
    return results, tuple(path for path in paths if path)


def _settings(results: Mapping[str, Any]) -> tuple[tuple[Point, ...], int]:
    """The thresholds to choose from, from the cheapest to the most accurate, and the index of the model's own."""
    own = _point(results.get("stages", {}).get("router", dict(threshold=0.5)))
    curve = [_point(point) for point in results.get("routing", {}).get("curve", [])]
    curve = curve or [_point(dict(threshold=i / _EVERY)) for i in range(_EVERY + 1)]
    points = {point["threshold"]: point for point in [*curve, own]}
    thresholds = sorted(points, reverse=True)
    return tuple(points[threshold] for threshold in thresholds), thresholds.index(own["threshold"])


def _point(stated: Mapping[str, Any]) -> Point:
    measured = {key: _number(stated.get(key)) for key in ("macs", *GROUPS)}
    used = [float(fraction) for fraction in stated.get("experts_used") or ()]
    return dict(threshold=float(stated["threshold"]), **measured, experts_used=used)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
