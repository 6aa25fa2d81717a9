"""Processes that die or stop: the others end with one line."""

import re
import signal
import sys

import pytest
from two_ranks import run_two_ranks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="several processes need WSL")

RANK = """
import os, signal, sys, time
import torch
from accelerate import Accelerator
from ride_timm.cli.process import exit_code
from ride_timm.training.heartbeat import Heartbeat

def command(argv):
    accelerator = Accelerator(cpu=True)
    heartbeat = Heartbeat(accelerator, limit=40, every=0.1)
    accelerator.reduce(torch.ones(1))
    if accelerator.process_index == int(sys.argv[1]):
        what = sys.argv[2]
        if what == "slow":
            time.sleep(5)  # longer than the limit, but alive
        else:
            os.kill(os.getpid(), getattr(signal, what))
    accelerator.reduce(torch.ones(1))
    heartbeat.close()
    print("done")

sys.exit(exit_code(command, None))
"""


@pytest.mark.parametrize(
    ("what", "line"),
    [("SIGSTOP", "process 1 of this run has stopped"), ("SIGKILL", "another process of this run has died")],
)
def test_a_process_that_stops_or_dies_ends_the_other_with_one_line(what, line):
    (out, error), _ = run_two_ranks("-c", RANK, 1, what, exits=(1, -signal.SIGKILL))
    assert out == "" and re.fullmatch(rf"error: {line}; --resume continues after the last finished epoch.*\n", error)


AGENT = """
from ride_timm.progress import progress_bar
os.environ["GROUP_RANK"] = "0"  # as torchrun's agent sets it
if sys.argv[1] != os.environ["RANK"]:
    os.kill = lambda pid, number: print("killed by", int(number), flush=True)

def command"""


def test_the_main_process_is_watched_too_and_its_end_is_a_line_below_the_bar():
    code = RANK.replace("    heartbeat =", "    bar = progress_bar(total=9)\n    heartbeat =")
    code = code.replace("def command", AGENT)
    _, (out, error) = run_two_ranks("-c", code, 0, "SIGSTOP", exits=(-signal.SIGKILL, 1))
    assert out == "killed by 9\n" and "0/9" in error  # so that the agent does not wait for it
    assert error.splitlines()[-1].startswith("error: process 0 of this run has stopped; --resume")


def test_a_slow_process_is_waited_for():
    assert run_two_ranks("-c", RANK, 1, "slow") == [("done\n", "")] * 2


def test_a_closed_port_is_a_notice():
    code = RANK.replace("def command", "Heartbeat._connect = lambda self, host, port: False\n\ndef command")
    (out, error), (other, nothing) = run_two_ranks("-c", code, 1, "slow")
    assert out == other == "done\n" and nothing == ""
    assert re.fullmatch(r"notice: port \d+ of 127\.0\.0\.1 is closed to some processes; one that .*\n", error)
