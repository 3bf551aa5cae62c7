"""The other ranks of `--nproc`: processes that rank 0 starts on its machine, and that never outlive it.

Where the ranks of a run find each other: the store of torchrun, of MASTER_ADDR, or one that rank 0 opens.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

import critic_train
from critic_train.errors import MachineError
from critic_train.settings import Settings, as_dict

PATIENCE_SECONDS = 30.0
"""How long ranks may take to end after rank 0 has."""

TAIL_BYTES = 2000
"""How much of a dead rank's last words is repeated."""


class Workers:
    """Ranks 1 to size - 1 on this machine; none where size is 1.

    Each is given the settings on its standard input, which rank 0 keeps open: at its end a worker knows that rank 0
    is gone and leaves as well, however rank 0 died.

    Args:
        settings: what they are to do.
        size: all ranks, rank 0 among them.
    """

    def __init__(self, settings: Settings, size: int) -> None:
        self.size = size
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._words: list[IO[bytes]] = []

    def start(self, port: int) -> None:
        """Start them; they join at `port` of this machine."""
        task = json.dumps({"command": self._settings.command, "settings": as_dict(self._settings)}).encode() + b"\n"
        shared = {
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(Path(critic_train.__file__).parents[1]), *filter(None, sys.path)]),
        }
        # Without a say of the user's, ranks divide the cores instead of fighting for them.
        threads = {"OMP_NUM_THREADS": str(threads_each(self.size))}
        for rank in range(1, self.size):
            words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the rest
            self._words.append(words)
            process = subprocess.Popen(
                [sys.executable, "-m", "critic_train.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=words,
                env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(task)
            process.stdin.flush()

    def lost(self) -> MachineError | None:
        """The fault of a worker that is gone without having told one; None while all are there."""
        for rank, process in enumerate(self._processes, start=1):
            code = process.poll()
            if code is None:
                continue
            whose = f"rank {rank} (process {process.pid})"
            if code < 0:
                return MachineError(
                    f"{whose} was killed by {signal.Signals(-code).name}",
                    hint="often the machine ran out of memory: a lower --max-tokens or --nproc needs less",
                )
            words = self._last_words(rank)
            return MachineError(f"{whose} ended with exit code {code}" + (f":\n{words}" if words else ""))
        return None

    def _last_words(self, rank: int) -> str:
        file = self._words[rank - 1]
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace").strip()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for them to end; make those end that do not."""
        until = time.monotonic() + (PATIENCE_SECONDS if error is None else PATIENCE_SECONDS / 6)
        for end in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in self._processes:
                if end is not None and process.poll() is None:
                    end(process)
                try:
                    process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        for process, words in zip(self._processes, self._words, strict=True):
            assert process.stdin is not None
            process.stdin.close()
            words.close()


def threads_each(size: int) -> int:
    """Threads for each of `size` ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // size)


def meet(rank: int, size: int, workers: Workers | None, timeout: timedelta) -> Store:
    """The store of all ranks; where rank 0 starts the others, it does so here.

    Args:
        rank: this process's number.
        size: how many ranks there are.
        workers: the ranks that rank 0 starts; None where the environment tells the place.
        timeout: how long the store waits for what it is asked for.

    Raises:
        MachineError: the environment does not say where rank 0 is.
    """
    if workers is not None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_each(size))
        store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
        workers.start(store.port)
        return PrefixStore("critic-train", store)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdecimal():
            raise MachineError(
                f"WORLD_SIZE is {size}, but MASTER_ADDR and MASTER_PORT do not say where rank 0 is",
                hint="start the ranks with torchrun, or set both on every machine",
            )
        store = TCPStore(address, int(port), is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        return PrefixStore("critic-train", store)
    met, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    return PrefixStore(f"critic-train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", met)
