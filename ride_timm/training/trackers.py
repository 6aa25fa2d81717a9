"""Log a run to experiment trackers: the recipe, the metrics of every epoch, its results and plots.

The metrics of each stage have its name as a prefix. A step is an epoch, counted over both stages.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..errors import RunError, first_line
from ..evaluation.tables import GROUPS, STAGE_NAMES, markdown_table, metrics_rows
from .recipe import Recipe
from .run_folder import RunFolder

PROJECT = "ride_timm"
_RESULTS = (*GROUPS, "top5", "macs", "epochs", "threshold", "experts_used")
_TABLE = "results/table"


def start_trackers(accelerator: Accelerator, recipe: Recipe, run: RunFolder) -> None:
    """Start the trackers that the accelerator was built with; RunError for one that does not start."""
    of_the_folder = dict(name=run.path.resolve().name, dir=str(run.path), resume="auto")  # also after --resume
    with _failing(accelerator, "did not start", "log in, or leave --tracker out, and pass --resume"):
        accelerator.init_trackers(PROJECT, hyperparameters(recipe), init_kwargs=dict(wandb=of_the_folder))
    threading.excepthook = _print_error


@contextmanager
def _failing(
    accelerator: Accelerator, what: str = "failed", way: str = "pass --resume, without --tracker if it fails again"
) -> Iterator[None]:
    """Raise RunError for any error of the trackers."""
    try:
        yield
    except Exception as error:  # they raise what they like
        names = ", ".join(map(str, accelerator.log_with))
        raise RunError(f"tracker {names} {what} ({first_line(error)}): {way}.") from error


def _print_error(arguments: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, except that of TensorBoard's writer, which the next call raises."""
    if not type(arguments.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(arguments)


def hyperparameters(recipe: Recipe) -> dict[str, int | float | str | bool]:
    """The recipe's keys for a tracker: numbers stay numbers, what a tracker cannot plot becomes text."""
    values = dataclasses.asdict(recipe)
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}


def log_epoch(accelerator: Accelerator, row: dict[str, Any], step: int) -> None:
    """Log the numbers of a row of metrics.csv, such as `experts/loss`; an epoch that is not tested has no accuracy.

    RunError where a tracker fails; the epoch is saved before.
    """
    with _failing(accelerator):
        accelerator.log(_numbers(row["stage"], row), step=step)


def end_trackers(accelerator: Accelerator) -> None:
    """Write what is still to be logged, and leave the other processes; RunError where a tracker fails."""
    with _failing(accelerator):
        accelerator.end_training()


def log_results(accelerator: Accelerator, run: RunFolder, step: int) -> None:
    """Log the final metrics, such as `results/router/all`, and for TensorBoard and W&B the table and the plots.

    RunError where a tracker fails; the results are saved before.
    """
    with _failing(accelerator):
        _log_results(accelerator, run, step)


def _log_results(accelerator: Accelerator, run: RunFolder, step: int) -> None:
    stages = run.results()["stages"]
    final = {stage: _final(metrics) for stage, metrics in stages.items()}
    for stage, values in final.items():
        accelerator.log(_numbers(f"results/{stage}", values), step=step)
    plots = {f"plots/{path.stem}": _pixels(path) for path in sorted(run.path.glob("*.png"))}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            table = metrics_rows({STAGE_NAMES[stage]: metrics for stage, metrics in stages.items()})
            tracker.log({_TABLE: markdown_table(table)}, step=step)
            tracker.log_images(plots, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            rows = [[STAGE_NAMES[stage], *values.values()] for stage, values in final.items()]
            tracker.log_table(_TABLE, columns=["model", *_RESULTS], data=rows, step=step)
            tracker.log_images(plots, step=step)


def _final(metrics: dict[str, Any]) -> dict[str, int | float | None]:
    """The numbers of a stage's results; the experts used are those of an image, on average."""
    if fractions := metrics.get("experts_used"):
        metrics = metrics | dict(experts_used=sum(i * fraction for i, fraction in enumerate(fractions, 1)))
    return {key: metrics.get(key) for key in _RESULTS}


def _numbers(prefix: str, values: dict[str, Any]) -> dict[str, int | float]:
    return {f"{prefix}/{key}": value for key, value in values.items() if isinstance(value, int | float)}


def _pixels(path: Path) -> np.ndarray:
    """A plot as a batch of one image, [1, H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[None]
