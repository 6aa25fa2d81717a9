"""The schema of state.pt: everything a run needs to resume."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError, listed
from ..files import sync
from ..models import Ride
from ..models.weights_file import weights_sha256


def trained_tensors(model: Ride) -> dict[str, Tensor]:
    """The state dict without what no stage trains: the frozen backbone under adapters."""
    frozen = model.frozen_names()
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained(model: Ride, tensors: dict[str, Any]) -> None:
    """Load trained tensors; the frozen ones stay. `InputError` for those of another network."""
    frozen = model.frozen_names()
    kept = {name: value for name, value in model.state_dict().items() if name in frozen}
    try:
        model.load_state_dict(kept | tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the state is that of another network than the recipe's ({reason}): restore recipe.yaml as it was, or "
            "choose another --output."
        ) from error


def frozen_sha256(model: Ride) -> str | None:
    """SHA-256 of the tensors that no stage trains; None where there are none."""
    frozen = model.frozen_names()
    return weights_sha256({k: v for k, v in model.state_dict().items() if k in frozen}) if frozen else None


def check_archive(path: Path) -> None:
    """OSError for a file of `torch.save` that is cut, or not as written.

    Compares sizes and CRC-32 of all records; torch.load takes changed numbers as they are.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(str(error)) from error
    if damaged is not None:
        raise OSError(f"{damaged} does not have its CRC-32")


class Resumable(Protocol):
    """The parts of a stage that change while it trains."""

    name: str
    model: Any
    optimizer: Any
    accelerator: Any
    ema: Any
    selection: Any
    loss: Any


@dataclass
class TrainingState:
    """A run after its last finished epoch; plain tensors, numbers and strings, so that it loads without code.

    stage, epoch: the stage in progress ("done" after the last) and how many of its epochs are finished.
    model, ema: their trained tensors; frozen: SHA-256 of the others, None where all are trained.
    source, teacher: `--from`, and the teacher as {"spec", "sha256"} of its weights.
    contents: training images as {"available", "class_counts"}, before the long-tailed selection and after it.
    unreadable: those of them left out, as row of the split and error.
    class_weights: of the loss, [C], where the recipe has them: a resumed run reads no file again.
    loss: buffers of a loss that follow from its batches so far.
    scaler: fp16's, which one stage passes to the next. history: one row of metrics.csv per epoch, over all stages.
    results: metrics of the finished stages.
    """

    stage: str = "experts"
    epoch: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    frozen: str | None = None
    source: str | None = None
    teacher: dict[str, str] | None = None
    contents: dict[str, Any] | None = None
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    class_weights: list[float] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def begun(self) -> bool:
        """An epoch is finished."""
        return bool(self.epoch or self.results)

    def capture(self, stage: Resumable, epoch: int) -> None:
        """Take over what a stage has reached after `epoch` epochs, by reference."""
        scaler = stage.accelerator.scaler
        self.stage, self.epoch = stage.name, epoch
        self.model = trained_tensors(stage.model)
        self.frozen = self.frozen or frozen_sha256(stage.model)
        self.optimizer = stage.optimizer.state_dict()
        self.scaler = None if scaler is None else scaler.state_dict()
        self.ema = None if stage.ema is None else trained_tensors(stage.ema.module)
        self.best = stage.selection.best
        self.loss = {} if stage.loss is None else stage.loss.state_dict()

    def restore(self, stage: Resumable) -> int:
        """Put a stage where this state left it; returns its finished epochs, 0 where it has not begun."""
        if stage.accelerator.scaler is not None and self.scaler is not None:
            stage.accelerator.scaler.load_state_dict(self.scaler)
        if self.stage != stage.name or self.epoch == 0:
            return 0
        load_trained(stage.model, self.model)
        try:
            stage.optimizer.load_state_dict(self.optimizer)
        except ValueError as error:
            raise InputError(f"the state of the optimizer does not fit ({error}): choose another --output.") from error
        if stage.ema is not None and self.ema is not None:
            load_trained(stage.ema.module, self.ema)
        stage.selection.best = self.best
        if stage.loss is not None:
            stage.loss.load_state_dict(self.loss)
        return self.epoch

    def advance(self, stage: str, model: dict[str, Any]) -> None:
        """Begin the next stage with these weights."""
        self.stage, self.epoch, self.model = stage, 0, model
        self.optimizer = self.ema = self.best = None
        self.loss = {}

    def write(self, path: Path) -> None:
        """Write a state to the disk, and read it back to check it."""
        torch.save(vars(self), path)
        sync(path)  # before the check, so that a disk that takes it only in part is found
        check_archive(path)

    @classmethod
    def read(cls, path: Path) -> TrainingState:
        """Read a state; raises `InputError` for one of a newer version, errors of any type for a damaged file."""
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if unknown := set(content) - {key.name for key in fields(cls)}:
            raise InputError(
                f"{path} was written by another version of ride_timm, as it has {listed(sorted(map(str, unknown)))}: "
                "resume the run with that version, or choose another --output."
            )
        return cls(**content)
