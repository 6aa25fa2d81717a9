"""Fixtures common to all tests."""

import gc
import importlib.util
import io
import os
import signal
import sys
import threading
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

# tests run offline; the Hub's clients read this at import
os.environ["HF_HUB_OFFLINE"] = "1"
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # a core each: commands take all that they find
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

ROOT = Path(__file__).parent.parent


def pytest_collection_finish():
    """Leave the libraries out of full collections, which take longer than the epochs of a tiny run."""
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def script():
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_accelerate", ROOT / "train_accelerate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_accelerate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def uncompiled(monkeypatch):
    """Run fused norms as plain tensor arithmetic, without compiling."""
    from ride_timm.models.fused import norm as fused_norm

    monkeypatch.setattr(fused_norm, "_compile", lambda function, inputs: function)
    monkeypatch.setattr(fused_norm, "_COMPILED", {})


@contextmanager
def _training(script):
    """Run the training script in this process and restore its global state."""
    import torch
    from accelerate.state import AcceleratorState

    from ride_timm.cli.process import exit_code

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(True)  # of a test that used Accelerate itself
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        # half the time of a tiny run; a process of its own plots
        patched.setattr("ride_timm.training.stages.plot_run", lambda *_: None)
        patched.setattr("threading.excepthook", threading.excepthook)  # trackers set it

        def train(argv):
            code = exit_code(script.train, [str(part) for part in argv])
            gc.collect()  # the lock of the folder, which the frames of an error still hold: a process would end
            return code

        yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture
def train(script):
    """The training script in this process: arguments -> exit code."""
    with _training(script) as train:
        yield train


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Folder of small long-tailed images by split and class, learned in a few steps."""
    from class_folders import write_class_folders

    counts = dict(train=(30, 16, 8), test=(10, 10, 10))
    return write_class_folders(tmp_path_factory.mktemp("colours"), counts, (32, 32), "class", ".png")


@pytest.fixture(scope="session")
def finished(script, colours, tmp_path_factory):
    """Uninterrupted run of both stages -> run folder, what it printed."""
    from journeys import flags_of

    output, printed = tmp_path_factory.mktemp("runs") / "finished", io.StringIO()
    with _training(script) as train, redirect_stdout(printed):
        assert train(flags_of(colours, output)) == 0
    return output, printed.getvalue()
