"""One command as two ranks on the CPU."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch

# forks of one process that has imported the libraries, which takes longer than most tests
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["accelerate", "timm", "pytest"])


def _run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Run `python *arguments` in this process, stdout and stderr to files."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run_two_ranks(*arguments, exits=(0, 0)) -> list[tuple[str, str]]:
    """Run a file, or -c and code, as ranks 0 and 1 -> (stdout, stderr) of each.

    exits: their exit codes; a rank that is to end by SIGKILL gets it when the other has ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shared |= dict(ACCELERATE_USE_CPU="1", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{rank}" for rank in range(2)]
        processes = []
        for rank, output in enumerate(outputs):
            environment = os.environ | shared | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            args = ([str(argument) for argument in arguments], environment, output)
            processes.append(_CONTEXT.Process(target=_run, args=args))
        try:
            for process in processes:
                process.start()
            for process, code in sorted(zip(processes, exits, strict=True), key=lambda rank: rank[1], reverse=True):
                if code == -signal.SIGKILL:
                    process.kill()
                process.join(120)
        finally:
            for process in processes:
                process.kill()
        printed = [tuple(Path(f"{output}.{name}").read_text() for name in ("out", "err")) for output in outputs]
    assert [process.exitcode for process in processes] == list(exits), printed
    return printed
