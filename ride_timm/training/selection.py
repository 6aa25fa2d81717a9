"""Model selection and early stopping on held-out images, never on the test set."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Selection:
    """Keeps the weights with the best held-out accuracy.

    patience: stop after so many evaluations without improvement, None never; eval_every: epochs between evaluations.
    """

    def __init__(self, patience: int | None, eval_every: int) -> None:
        self.patience, self.eval_every = patience, eval_every
        self.best: dict[str, Any] = dict(accuracy=None, epoch=0, model={})

    def update(self, accuracy: float, epoch: int, weights: dict[str, Tensor]) -> None:
        """Record the accuracy of weights after an epoch, counted from 1; ties keep the earlier one."""
        if self.best["accuracy"] is None or accuracy > self.best["accuracy"]:
            copies = {name: value.clone() for name, value in weights.items()}
            self.best = dict(accuracy=accuracy, epoch=epoch, model=copies)

    def exhausted(self, epochs: int) -> bool:
        """Patience has run out after so many epochs."""
        return self.patience is not None and epochs - self.best["epoch"] >= self.patience * self.eval_every
