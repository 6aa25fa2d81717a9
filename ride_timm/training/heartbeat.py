"""Processes of a run that stop answering, noticed by the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..progress import line_end

_CONNECT = timedelta(seconds=20)


class Heartbeat:
    """Ends this process with 1 and one line where another process of the run has stopped.

    A collective waits six hours for such a process, as it must for one that downloads a data set. So a thread of each
    process beats every `every` seconds in a store of the main process, which watches all of them; the others watch the
    main process. One that misses `limit` beats has stopped. Beats are counted, not timed: a suspended machine misses
    none. It is killed where both have the same agent of torchrun, which otherwise waits half a minute for it to end.
    With one process, or where one cannot connect to the store (its port is any free one), does nothing.
    """

    def __init__(self, accelerator: Accelerator, limit: int = 18, every: float = 2) -> None:
        self.accelerator, self.limit, self.every = accelerator, limit, every
        self._closed = threading.Event()
        if accelerator.num_processes == 1:
            return
        host, main = os.environ.get("MASTER_ADDR", "127.0.0.1"), accelerator.is_main_process
        if main:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = broadcast_object_list([self._store.port if main else None])[0]
        connected = main or self._connect(host, port)
        agent = os.environ.get("GROUP_RANK")  # torchrun's, one per machine
        found = gather_object([(connected, agent, os.getpid())])
        self._neighbours = {rank: pid for rank, (_, other, pid) in enumerate(found) if agent and other == agent}
        if not all(connected for connected, *_ in found):
            if main:
                print(
                    f"notice: port {port} of {host} is closed to some processes; one that stops answering ends the run "
                    "only after six hours.",
                    file=sys.stderr,
                )
            return
        self._beats = dict.fromkeys(range(1, accelerator.num_processes) if main else [0], 0)
        for task in (self._beat, self._watch):
            threading.Thread(target=task, daemon=True).start()

    def _connect(self, host: str, port: int) -> bool:
        try:
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_CONNECT)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Stop watching, on all processes at once."""
        self._closed.set()
        self.accelerator.wait_for_everyone()  # the store lives in the main process, and all watch it

    def _beat(self) -> None:
        """Beat, and read the others' beats; waits without end where the main process has stopped."""
        try:
            while not self._closed.wait(self.every):
                self._store.add(str(self.accelerator.process_index), 1)
                for rank in self._beats:
                    self._beats[rank] = self._store.add(str(rank), 0)
        except RuntimeError:  # the main process has died
            self._end(0)

    def _watch(self) -> None:
        last, missed = dict(self._beats), dict.fromkeys(self._beats, 0)
        while not self._closed.wait(self.every):
            for rank, beats in list(self._beats.items()):
                missed[rank] = missed[rank] + 1 if beats == last[rank] else 0
                last[rank] = beats
                if missed[rank] > self.limit:
                    return self._end(rank)

    def _end(self, rank: int) -> None:
        # after a moment for the main thread to end by itself, since a collective with a dead process fails
        if not self._closed.wait(2 * self.every) and threading.main_thread().is_alive():
            way = "--resume continues after the last finished epoch."
            print(f"{line_end()}error: process {rank} of this run has stopped; {way}", file=sys.stderr, flush=True)
            if rank in self._neighbours:
                with suppress(ProcessLookupError):  # it has died since
                    os.kill(self._neighbours[rank], signal.SIGKILL)
            os._exit(1)  # the main thread waits in a collective, which nothing interrupts
