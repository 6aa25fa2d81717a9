"""Signals and non-finite losses, noticed by all processes at the same step."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ..errors import RunError
from .recipe import stage_flag

CHECK_EVERY = 20  # steps between two looks at the losses, each of which waits for the device
FIRST_CHECKS = (3, 10)  # steps of a stage; before the third, a network is compiled and a cache filled
MAX_MS = 10_000  # between two looks; a launcher kills processes half a minute after it has sent them a signal
MIN_SECONDS = 5  # of training that an estimate is made from


class Signals(Protocol):
    """SIGINT and SIGTERM, caught by a handler and raised by `check`."""

    caught: int | None

    def check(self) -> object: ...


class Watch:
    """Collects the losses of an epoch and ends the run where it must end.

    Processes agree before any of them raises: one that left alone would leave the others waiting in a collective. With
    one process a signal is raised at once, with several at the next check, which comes sooner where steps are slow.
    """

    def __init__(self, accelerator: Accelerator, signals: Signals, mixed_precision: str) -> None:
        self.accelerator, self.signals = accelerator, signals
        self.stage, self.every = "", CHECK_EVERY
        self.other_advice = "" if mixed_precision == "no" else " or --mixed-precision no"

    def begin_epoch(self, stage: str, epoch: int, num_steps: int, epochs: int) -> None:
        """epoch: counted from 0, for the error; epochs: of the stage, for the estimate of its time."""
        self.last_check: tuple[float, int] | None = (time.perf_counter(), 0)  # time, and step of the epoch
        if stage != self.stage:
            self.stage, self.steps, self.last_check = stage, 0, None
            self.timed, self.seconds, self.estimated = 0, 0.0, False  # steps, and the time they took
            self.total, self.epochs = num_steps * (epochs - epoch), epochs - epoch
        self.epoch, self.step = epoch, 0
        self.losses = torch.zeros(num_steps, device=self.accelerator.device)

    def update(self, loss: Tensor) -> None:
        """Record the loss of a step; raises as `check` does, every few steps and at the `FIRST_CHECKS`."""
        self.losses[self.step] = loss.detach()
        self.step += 1
        self.steps += 1
        if self.accelerator.num_processes == 1:
            self.signals.check()
        if self.step % self.every == 0 or self.steps in FIRST_CHECKS:
            self._check_losses()

    def mean(self) -> float:
        """The epoch's mean loss over all processes."""
        self._check_losses()
        return self.accelerator.reduce(self.losses, "mean").mean().item()

    def batches(self, loader: Collection[Any]) -> Iterator[Any]:
        """The loader's batches; raises a signal between two of them, with several processes while all have one."""
        several = self.accelerator.num_processes > 1
        shared, given = -self._agree(-len(loader))[0], 0
        for batch in loader:
            if not several:
                self.signals.check()
            elif given < shared:
                self.check()
            given += 1
            yield batch
        for _ in range(given, shared if several else 0):  # a part of a stream may have fewer batches than its length
            self.check()

    def check(self) -> None:
        """Raise on all processes if a signal has come to any of them."""
        self._agree()

    def _check_losses(self) -> None:
        """`check`, and `RunError` for the first loss that is not finite."""
        bad = ~self.losses[: self.step].isfinite()
        # as a maximum over the processes, the first bad step is the one with the most steps from it to the end
        remaining = torch.where(bad, torch.arange(self.step, 0, -1, device=bad.device), 0).amax().item()
        now, seconds, steps = time.perf_counter(), 0.0, 0
        if self.last_check is not None:
            seconds, steps = now - self.last_check[0], self.step - self.last_check[1]
        self.last_check = now, self.step
        remaining, slowest = self._agree(int(remaining), round(1000 * seconds / steps) if steps else 0)  # milliseconds
        if remaining:
            step = self.step - remaining + 1
            advice = f"a lower {stage_flag(self.stage, 'lr')}{self.other_advice}"
            raise RunError(f"the loss is not finite at epoch {self.epoch + 1}, step {step}: try {advice}.")
        if slowest:
            self.every = min(CHECK_EVERY, max(1, MAX_MS // slowest))
        self._estimate(seconds, steps)

    def _estimate(self, seconds: float, steps: int) -> None:
        """Print once how long a stage of some minutes will take, without its first steps and its evaluations.

        seconds, steps: since the last look at the losses.
        """
        self.seconds += seconds
        self.timed += steps
        if not self.estimated and self.timed and self.seconds >= MIN_SECONDS:
            self.estimated = True
            seconds = self.seconds / self.timed * self.total
            if seconds > 120 and self.accelerator.is_main_process:
                span = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
                print(f"notice: stage {self.stage}: about {span} for {self.epochs} epochs", file=sys.stderr)

    def _agree(self, *numbers: int) -> list[int]:
        """Maxima of numbers over the processes; raises a signal that has come to any of them."""
        found = [self.signals.caught or 0, *numbers]
        if self.accelerator.num_processes > 1:
            tensor = torch.tensor(found, device=self.accelerator.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            found = tensor.tolist()
        if found[0]:  # never reset: a signal may have come since
            self.signals.caught = found[0]
        if found[0] or self.accelerator.num_processes == 1:  # one that came since waits until all know of it
            self.signals.check()
        return found[1:]
