"""Runs of the training script on small images, complete or interrupted."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

from ride_timm.cli.process import Interrupted
from ride_timm.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "train_accelerate.py")
TINY = ["--model", "test_ride_resnet", "--num-experts", "2", "--imb-type", "none", "--augment", "cifar"]
TINY += ["--epochs", "3", "--router-epochs", "2", "--warmup-epochs", "1", "--batch-size", "16", "--lr", "0.002"]
TINY += ["--router-batch-size", "32", "--drop-rate", "0.1", "--eval-every", "2"]


def launch_two_processes(port, *flags):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    command = [*launcher, "--main_process_port", port, SCRIPT, *map(str, flags)]
    quiet = dict(HF_DATASETS_DISABLE_PROGRESS_BARS="1", ACCELERATE_USE_CPU="1", PYTHONPATH=str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | quiet)


def flags_of(colours, output, *more):
    return ["--dataset", str(colours), "--output", str(output), "--threads", "1", *TINY, *more]


def rows_of(folder):
    with open(folder / "metrics.csv") as lines:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines)]


def damage(path):
    """Change bytes in the middle of a file, more than the padding between two records of `torch.save`."""
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 100)
    data[middle] = bytes(value ^ 1 for value in data[middle])
    path.write_bytes(data)


def fill(folder):
    """Fill the disk of a folder by a file, which is returned."""
    path = folder / "ballast"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as ballast:
        for size in (2**16, 1):
            while ballast.write(bytes(size)):
                pass
    return path


def stop_after_epoch(monkeypatch, of="experts", last=1):
    original = RunFolder.save

    def save(self, state):
        original(self, state)
        if (state.stage, state.epoch) == (of, last):
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "save", save)
