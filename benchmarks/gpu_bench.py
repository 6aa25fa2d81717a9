"""The device under test, its time budget, and the results of its sections."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ride_timm.errors import first_line


class OutOfTime(BaseException):
    """The time budget is used up; no library catches it."""


@dataclass
class Bench:
    """A device and a deadline, on the monotonic clock, and what the running section has found so far.

    toy: sizes for a CPU. rows: results; wrong: names of those that are wrong or failed; left_out: those not measured.
    """

    args: argparse.Namespace
    device: torch.device
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def toy(self) -> bool:
        return self.args.toy

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def networks(self) -> dict[str, int]:
        """Networks to check, with their image sizes."""
        if self.toy:
            return {"ride_resnet32": 16, "test_ride_resnet": 32}
        return {"ride_resnet32": 32, "ride_resnext50": 224}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def has(self, precision: str) -> bool:
        """True for a precision that the device has; TF32 and fp16 are those of GPUs."""
        if not self.on_gpu:
            return precision in ("fp32", "bf16")
        return precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)

    def allow_tf32(self, allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    def free(self) -> None:
        """Give back the memory of earlier measurements."""
        gc.collect()
        if self.on_gpu:
            with suppress(RuntimeError):  # an error that CUDA repeats at every call has its line already
                torch.cuda.empty_cache()

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Body of one row of checks: its error is one line, and the next row is checked."""
        try:
            yield
        except Exception as error:
            self.fail(name, error)
        finally:
            self.free()

    def check(self, name: str, error: float, tolerance: float, note: str = "") -> None:
        """Compare an error to its tolerance; any that is not below, such as NaN, is wrong."""
        right = error <= tolerance
        self.rows.append(dict(name=name, error=error, tolerance=tolerance))
        if not right:
            self.wrong.append(name)
        note = f"; {note}" if note else ""
        print(f"  {'ok' if right else 'WRONG'}: {name}: {error:.2g}, at most {tolerance:g}{note}", flush=True)

    def measure(self, name: str, seconds: float, run: Callable[[], dict[str, Any]]) -> None:
        """Measure and print a row, or one line for its error; left out if it needs more seconds than are left."""
        if self.left() < seconds:
            return self.skip(name, f"needs {seconds:.0f} s, {max(self.left(), 0):.0f} are left")
        try:
            row = run()
        except Exception as error:
            return self.fail(name, error)
        finally:
            self.free()
        self.rows.append(dict(name=name) | row)
        values = [f"{key} {value:.4g}" for key, value in row.items() if value is not None]
        print(f"  {name}: {', '.join(values)}", flush=True)

    def skip(self, name: str, reason: str) -> None:
        self.left_out.append(name)
        print(f"  left out: {name}: {reason}", flush=True)

    def fail(self, name: str, error: Exception) -> None:
        self.wrong.append(name)
        self.rows.append(dict(name=name, failed=first_line(error)))
        print(f"  FAILED: {name}: {first_line(error)}", flush=True)
