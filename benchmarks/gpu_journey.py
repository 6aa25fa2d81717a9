"""The commands of a user on a device, in processes of their own: training, resuming, evaluation, prediction."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from batches import random_images
from gpu_bench import Bench
from record import ROOT


def journey(bench: Bench) -> None:
    """Experts of the embedded data set; the router, by resuming; evaluation; prediction of image files."""
    if find_spec("datasets") is None:
        return bench.skip("all commands", "datasets is not installed")
    epochs = 1 if bench.toy else 2
    how = ["--epochs", epochs, "--router-epochs", epochs, "--warmup-epochs", 0]
    how += ["--model", "test_ride_resnet", "--mixed-precision", "no"] if bench.toy else []
    with TemporaryDirectory() as folder:
        run, images = Path(folder, "run"), random_images([4], 28)
        files = [Path(folder, f"{i}.png") for i in range(len(images))]
        for i, file in enumerate(files):
            images[i][0].save(file)
        threads = ["--threads", bench.args.threads]
        commands: dict[str, list[Any]] = {
            "train": ["train_accelerate.py", "--output", run, "--stage", "experts", *how, *threads],
            "resume": ["train_accelerate.py", "--output", run, "--resume", *threads],
            "evaluate": ["-m", "ride_timm", "evaluate", "--model", run, "--routed", *threads],
            "predict": ["-m", "ride_timm", "predict", "--model", run, "--device", bench.device, *threads, *files],
        }
        for name, command in commands.items():

            def timed(command: list[Any] = command) -> dict[str, float]:
                started = time.perf_counter()
                run_python([str(part) for part in command])
                return dict(seconds=time.perf_counter() - started)

            bench.measure(name, 0 if bench.toy else 10, timed)


def run_python(arguments: list[str]) -> None:
    """Run Python in the checkout; RuntimeError with the last line of its error."""
    ran = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        last = ran.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"{' '.join(arguments[:3])} … returned {ran.returncode}: {last}")
