"""One command as two ranks on the CPU."""

import os
import socket
import subprocess
import sys


def run_two_ranks(*arguments) -> list[tuple[str, str]]:
    """Run `python *arguments` as ranks 0 and 1 -> (stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shared |= dict(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    shared |= dict(PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs
