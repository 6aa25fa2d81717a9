"""The schema of state.pt: everything a run needs to resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import InputError


class Resumable(Protocol):
    """The parts of a stage that change while it trains."""

    name: str
    model: Any
    optimizer: Any
    accelerator: Any
    ema: Any
    selection: Any


@dataclass
class TrainingState:
    """A run after its last finished epoch; plain tensors, numbers and strings, so that it loads without code.

    stage, epoch: the stage in progress ("done" after the last) and how many of its epochs are finished.
    source, teacher: `--from`, and the teacher as {"spec", "sha256"} of its weights.
    class_weights: of the loss, [C], where the recipe has them: a resumed run reads no file again.
    scaler: fp16's, which one stage passes to the next. history: one row of metrics.csv per epoch, over all stages.
    results: metrics of the finished stages.
    """

    stage: str = "experts"
    epoch: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    teacher: dict[str, str] | None = None
    class_weights: list[float] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    best: dict[str, Any] | None = None

    @property
    def begun(self) -> bool:
        """An epoch is finished."""
        return bool(self.epoch or self.results)

    def capture(self, stage: Resumable, epoch: int) -> None:
        """Take over what a stage has reached after `epoch` epochs, by reference."""
        scaler = stage.accelerator.scaler
        self.stage, self.epoch = stage.name, epoch
        self.model = stage.model.state_dict()
        self.optimizer = stage.optimizer.state_dict()
        self.scaler = None if scaler is None else scaler.state_dict()
        self.ema = None if stage.ema is None else stage.ema.module.state_dict()
        self.best = stage.selection.best

    def restore(self, stage: Resumable) -> int:
        """Put a stage where this state left it; returns its finished epochs, 0 where it has not begun."""
        if stage.accelerator.scaler is not None and self.scaler is not None:
            stage.accelerator.scaler.load_state_dict(self.scaler)
        if self.stage != stage.name or self.epoch == 0:
            return 0
        stage.model.load_state_dict(self.model)
        try:
            stage.optimizer.load_state_dict(self.optimizer)
        except ValueError as error:
            raise InputError(f"the state of the optimizer does not fit ({error}): choose another --output.") from error
        if stage.ema is not None:
            stage.ema.module.load_state_dict(self.ema)
        stage.selection.best = self.best
        return self.epoch

    def advance(self, stage: str, model: dict[str, Any]) -> None:
        """Begin the next stage with these weights."""
        self.stage, self.epoch, self.model = stage, 0, model
        self.optimizer = self.ema = self.best = None
