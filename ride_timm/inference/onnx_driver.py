"""Run a routed ONNX export by numpy and onnxruntime: `OnnxRouted(folder)(images)`.

`python -m ride_timm export --routed driver` copies this file into the folder as driver.py.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def load_session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Load a graph on the CPU; threads: 0 for all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # threads that spin while waiting for the next call would slow the other graphs down
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a routed export; ValueError for another file, or where a graph is missing."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, num_experts, num_classes, threshold = (
            manifest[key] for key in ("kind", "num_experts", "num_classes", "threshold")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the manifest of an export ({type(error).__name__}: {error}).") from error
    if kind != "driver":
        raise ValueError(f"{folder} holds an export of kind {kind!r}, expected 'driver'.")
    for key, value in (("num_experts", num_experts), ("num_classes", num_classes)):
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{path} states {key}={value!r}, expected a whole number above 0.")
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
        raise ValueError(f"{path} states threshold={threshold!r}, expected a probability.")
    experts = (f"expert_{i + 1}" for i in range(num_experts))
    gates = (f"gate_{i + 1}" for i in range(num_experts - 1))
    for name in chain(["trunk"], experts, gates):
        if not (folder / f"{name}.onnx").is_file():
            raise ValueError(f"{folder} lacks {name}.onnx, one of the graphs of {num_experts} experts.")
    return manifest


class OnnxRouted:
    """An exported model whose experts run only on the samples sent to them.

    threshold: gate probability above which the next expert runs, the manifest's by default; threads: 0 for all cores.
    Raises ValueError as `read_manifest` does.
    """

    def __init__(self, folder: str | Path, threshold: float | None = None, threads: int = 0) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.threshold = self.manifest["threshold"] if threshold is None else threshold
        num_experts = self.manifest["num_experts"]
        self.trunk = load_session(folder / "trunk.onnx", threads)
        self.experts = [load_session(folder / f"expert_{i + 1}.onnx", threads) for i in range(num_experts)]
        self.gates = [load_session(folder / f"gate_{i + 1}.onnx", threads) for i in range(num_experts - 1)]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalised images [B, 3, H, W] -> (logits [B, C], num_experts_used [B])"""
        used = np.ones(len(images), dtype=np.int64)
        output = np.zeros((len(images), self.manifest["num_classes"]), dtype=np.float32)
        if len(images) == 0:
            return output, used
        (x,) = self.trunk.run(None, {"images": images})
        rows = np.arange(len(images))  # samples that the last gates sent on
        total: Any = 0
        for i, expert in enumerate(self.experts):
            features, logits = expert.run(None, {"maps": x})
            total = total + logits
            mean = total / np.float32(i + 1)
            output[rows] = mean
            if i + 1 == len(self.experts):
                break
            (probability,) = self.gates[i].run(None, {"features": features, "mean_logits": mean})
            passed = probability > self.threshold
            if not passed.any():
                break
            if not passed.all():
                x, total, rows = x[passed], total[passed], rows[passed]
            used[rows] = i + 2
        return output, used
