"""Signals and non-finite losses end all processes at the same step."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from two_ranks import run_two_ranks

from ride_timm import RunError
from ride_timm.cli.process import Interrupted
from ride_timm.training.watch import CHECK_EVERY, Watch


class Caught:
    caught = None

    def check(self):
        if self.caught is not None:
            raise Interrupted(self.caught)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def watch_of(num_steps, signals=None, precision="no"):
    watch = Watch(Accelerator(cpu=True), signals or Caught(), precision)
    watch.begin_epoch("experts", 2, num_steps, 3)
    return watch


@pytest.mark.parametrize(
    ("num_steps", "seconds", "at", "notice"),
    [
        (100, 0.1, None, ""),
        (100, 1.0, (1, 10), "notice: stage experts: about 3 minutes for 2 epochs\n"),
        (100, 60.0, (1, 10), "notice: stage experts: about 3.3 hours for 2 epochs\n"),
        (1000, 0.2, (1, 40), "notice: stage experts: about 7 minutes for 2 epochs\n"),  # after 5 seconds
        (6, 60.0, (1, 6), "notice: stage experts: about 12 minutes for 2 epochs\n"),
        (2, 60.0, (2, 1), "notice: stage experts: about 4 minutes for 2 epochs\n"),
    ],
)
def test_the_time_of_a_long_stage_is_estimated_once_and_soon(num_steps, seconds, at, notice, monkeypatch, capsys):
    """Of the steps alone: the first are slow, and an evaluation follows each epoch."""
    now = [0.0]
    monkeypatch.setattr("ride_timm.training.watch.time.perf_counter", lambda: now[0])
    watch = Watch(Accelerator(cpu=True), Caught(), "no")
    for epoch in (1, 2):  # two of three epochs are left
        watch.begin_epoch("experts", epoch, num_steps, 3)
        for step in range(num_steps):
            now[0] += 100 if (epoch, step) == (1, 0) else seconds
            watch.update(torch.tensor(1.0))
            if step + 1 == num_steps:
                watch.mean()
            assert capsys.readouterr().err == (notice if (epoch, step + 1) == at else "")
        now[0] += 1000


@pytest.mark.parametrize("bad", [0, 7, CHECK_EVERY - 1, CHECK_EVERY, 49])
def test_a_non_finite_loss_is_found_within_the_epoch(bad):
    watch, seen = watch_of(50, precision="bf16"), 0
    with pytest.raises(RunError, match=rf"epoch 3, step {bad + 1}: try a lower --lr or --mixed-precision no"):
        for step in range(50):
            seen = step
            watch.update(torch.tensor(float("nan") if step == bad else 1.0))
        watch.mean()
    assert seen - bad < CHECK_EVERY


@pytest.mark.parametrize("stage, flag", [("experts", "--lr"), ("heads", "--decouple-lr"), ("router", "--router-lr")])
def test_the_advice_names_the_learning_rate_of_the_stage(stage, flag):
    watch = Watch(Accelerator(cpu=True), Caught(), "no")
    watch.begin_epoch(stage, 0, 1, 1)
    watch.update(torch.tensor(float("inf")))
    with pytest.raises(RunError, match=f"try a lower {flag}\\."):
        watch.mean()


def test_the_mean_is_over_all_steps():
    watch = watch_of(3)
    for loss in (1.0, 2.0, 6.0):
        watch.update(torch.tensor(loss))
    assert watch.mean() == 3.0


def test_one_process_raises_a_signal_at_once():
    signals = Caught()
    watch = watch_of(3, signals)
    watch.update(torch.tensor(1.0))
    signals.caught = 15
    with pytest.raises(Interrupted):
        watch.update(torch.tensor(1.0))
    with pytest.raises(Interrupted):
        next(iter(watch.batches([1, 2])))


def test_a_signal_that_comes_while_the_losses_are_read_is_kept():
    """The handler runs between two lines of Python: after the flag was read, before the check."""
    signals = Caught()
    watch = watch_of(CHECK_EVERY, signals)
    agree = watch._agree

    def late(*numbers):
        signals.caught = 15
        return agree(*numbers)

    watch._agree = late
    with pytest.raises(Interrupted):
        for _ in range(CHECK_EVERY):
            watch.update(torch.tensor(1.0))


RANK = """
import sys
import torch
from accelerate import Accelerator
from ride_timm import RunError
from ride_timm.cli.process import Interrupted
from ride_timm.training.watch import Watch

class Caught:
    caught = None
    def check(self):
        if self.caught is not None:
            raise Interrupted(self.caught)

accelerator, signals = Accelerator(cpu=True), Caught()
watch = Watch(accelerator, signals, "no")
watch.begin_epoch("experts", 0, 100, 1)
if accelerator.process_index == 1 and sys.argv[1] == "late":
    reduce = torch.distributed.all_reduce

    def late(*args):  # the signal comes to this process while the processes agree on none
        reduce(*args)
        signals.caught = 15

    torch.distributed.all_reduce = late
step = -1
try:
    if sys.argv[1] == "slow":
        import itertools, time
        times = itertools.count(0, 0 if accelerator.process_index else 7 * 12)  # of the first 3 steps, of the next 7, …
        time.perf_counter = lambda: next(times)
    if sys.argv[1] == "short":  # of a stream, one process may have fewer batches than the length says
        class Short(list):
            __len__ = lambda self: 3
        print(*watch.batches(Short("a" if accelerator.process_index else "abc")), *watch.batches("de"))
    for batch in watch.batches("abc" if accelerator.process_index else "ab") if sys.argv[1] == "batches" else ():
        signals.caught = 15 if batch == "a" and accelerator.process_index else None
        print("batch", batch, end=" ")
    for step in range(100):
        if accelerator.process_index == 1 and step == 25 and sys.argv[1] in ("signal", "slow"):
            signals.caught = 15
        bad = accelerator.process_index == 1 and step == 25 and sys.argv[1] == "nan"
        watch.update(torch.tensor(float("nan") if bad else 1.0))
except (Interrupted, RunError) as error:
    print(step, type(error).__name__, *error.args)
"""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("signal", "39 Interrupted 15"),
        ("slow", "25 Interrupted 15"),  # the main process takes 12 seconds a step
        ("batches", "batch a -1 Interrupted 15"),
        ("late", "9 Interrupted 15"),  # at the second look
        ("short", "a "),  # ends: no process waits for another
        ("nan", "39 RunError the loss is not finite at epoch 1, step 26"),
    ],
)
def test_two_processes_stop_at_the_same_step(kind, expected):
    outputs = run_two_ranks("-c", RANK, kind)
    assert all(out.startswith(expected) for out, _ in outputs), outputs
