"""Export a model to ONNX, with or without its router, and a manifest.

Three kinds. `ensemble`: one graph of all experts. `masked`: one graph that computes all experts and masks those that
the gates skip: the router's predictions at the ensemble's cost, for servers that take one graph. `driver`: a graph for
the trunk, each expert and each gate, and a small driver that runs an expert only on the samples sent to it. All take
any batch size.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import InputError
from ..files import new_folder
from ..models import Ride, Router
from ..models.release import DATA_CONFIG, class_names

KINDS = {"none": "ensemble", "masked": "masked", "driver": "driver"}  # by the value of --routed


class _Ensemble(nn.Module):
    def __init__(self, model: Ride) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images))


class _Gate(nn.Module):
    def __init__(self, router: Router | None, i: int) -> None:
        super().__init__()
        assert router is not None  # a network without one has nothing to route
        self.router, self.i = router, i

    def forward(self, features: Tensor, mean_logits: Tensor) -> Tensor:
        return self.router.gate(self.i, features, mean_logits).sigmoid()


class _Masked(nn.Module):
    """All experts on every sample, which keeps the mean of those that it is routed to."""

    def __init__(self, model: Ride) -> None:
        super().__init__()
        self.trunk, self.num_experts = model.trunk, model.num_experts
        self.experts = model.experts
        self.gates = nn.ModuleList(_Gate(model.router, i) for i in range(model.num_experts - 1))

    def forward(self, images: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(images)
        features, total = self.experts[0](x)
        output = mean = total
        passed = torch.ones_like(total[:, 0], dtype=torch.bool)  # [B]
        used = passed.long()
        for i in range(1, self.num_experts):
            passed = passed & (self.gates[i - 1](features, mean) > threshold)
            features, logits = self.experts[i](x)
            total = total + logits
            mean = total / (i + 1)
            output = torch.where(passed[:, None], mean, output)
            used = used + passed.long()
        return output, used


def check_export(folder: str | Path, model: Ride | None = None, routed: str = "none") -> None:
    """InputError for missing packages, a folder in use, or a missing router."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"exporting needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file: pass a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output {folder} is not empty: choose another folder.")
    if model is not None and routed != "none" and model.router is None:
        raise InputError(f"routed={routed}: this model has no router: leave --routed out, or train stage two.")


def export(
    model: Ride, folder: str | Path, routed: str = "none", threshold: float = 0.5, size: int | None = None
) -> Path:
    """Write the graphs and manifest.json to a new folder, all or nothing; returns it.

    routed: "none", "masked" or "driver"; threshold: in the manifest, the driver's default; size: image size, the
    model's by default. InputError as in `check_export`; RunError if writing fails.
    """
    folder = Path(folder)
    check_export(folder, model, routed)
    model = deepcopy(model).float().eval().to("cpu", memory_format=torch.contiguous_format)
    cfg = model.pretrained_cfg
    size = size or cfg["input_size"][-1]
    manifest = dict(
        kind=KINDS[routed],
        architecture=cfg.get("architecture"),
        **{key: cfg.get(key) for key in DATA_CONFIG} | dict(input_size=[model.in_chans, size, size]),
        num_classes=model.num_classes,
        num_experts=model.num_experts,
        threshold=None if routed == "none" else threshold,
        labels=class_names(model),
        versions={"ride-timm": __version__, **{name: version(name) for name in ("torch", "onnx")}},
    )
    with new_folder(folder) as partial:
        manifest["graphs"] = _write_graphs(model, partial, routed, size)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if routed == "driver":
            shutil.copyfile(Path(__file__).with_name("onnx_driver.py"), partial / "driver.py")
    return folder


@torch.no_grad()
def _write_graphs(model: Ride, folder: Path, routed: str, size: int) -> dict[str, Any]:
    """Write the graphs of a kind -> {file: {"inputs", "outputs"}}."""
    graphs: dict[str, Any] = {}
    images = torch.randn(2, model.in_chans, size, size)

    def write(file: str, module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> Any:
        graphs[file] = dict(inputs=list(inputs), outputs=outputs)
        _export_graph(module.eval(), folder / file, inputs, outputs)
        return module(*inputs.values())

    if routed == "none":
        write("model.onnx", _Ensemble(model), dict(images=images), ["logits"])
    elif routed == "masked":
        inputs = dict(images=images, threshold=torch.tensor(0.5))
        write("model.onnx", _Masked(model), inputs, ["logits", "experts_used"])
    else:
        maps = write("trunk.onnx", model.trunk, dict(images=images), ["maps"])
        for i, expert in enumerate(model.experts):
            features, logits = write(f"expert_{i + 1}.onnx", expert, dict(maps=maps), ["features", "logits"])
            if i + 1 < model.num_experts:
                inputs = dict(features=features, mean_logits=logits)
                write(f"gate_{i + 1}.onnx", _Gate(model.router, i), inputs, ["probability"])
    return graphs


def _export_graph(module: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: list[str]) -> None:
    """Write one self-contained file; all inputs but scalars have a dynamic batch."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if value.ndim else {} for value in inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's internals
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
