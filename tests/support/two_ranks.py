"""One command as two ranks on the CPU."""

import signal
import socket
import sys

import pytest
from forked import Python


def run_two_ranks(*arguments, exits=(0, 0)) -> list[tuple[str, str]]:
    """Run a file, or -c and code, as ranks 0 and 1 -> (stdout, stderr) of each.

    Skips the test on Windows, where several processes need WSL.

    exits: their exit codes; a rank that is to end by SIGKILL gets it when the other has ended.
    """
    if sys.platform == "win32":
        pytest.skip("several processes need WSL")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shared |= dict(ACCELERATE_USE_CPU="1", CUDA_VISIBLE_DEVICES="")
    ranks = [Python(*arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        for rank, code in sorted(zip(ranks, exits, strict=True), key=lambda pair: pair[1], reverse=True):
            if code == -signal.SIGKILL:
                rank.kill()
            rank.wait()
    finally:
        for rank in ranks:
            rank.kill()
    printed = [(rank.stdout, rank.stderr) for rank in ranks]
    assert [rank.exit_code for rank in ranks] == list(exits), printed
    return printed
