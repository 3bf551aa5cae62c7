"""The processes that rank 0 starts for `--nproc`, which never outlive it, and the store where all ranks meet.

The store is that of torchrun, one at MASTER_ADDR, or one that rank 0 opens on its machine.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

import critic_train
from critic_train.distributed.ranks import on_cuda
from critic_train.errors import MachineError
from critic_train.settings import Settings, as_dict

PATIENCE_SECONDS = 30.0
"""How long ranks may take to end after rank 0 has."""

TAIL_BYTES = 2000
"""How much of the end of a failed rank's standard error is repeated."""


class Workers:
    """Ranks 1 to size - 1 on this machine; none where size is 1.

    Each is given the settings on its standard input, which rank 0 keeps open: when it closes, rank 0 has ended,
    however that was, and the worker ends as well.

    Args:
        settings: of the command.
        size: number of ranks, rank 0 among them.
    """

    def __init__(self, settings: Settings, size: int) -> None:
        self.size = size
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stderr: list[IO[bytes]] = []

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
        # Unless the user sets it, ranks divide the cores between them.
        threads = {"OMP_NUM_THREADS": str(threads_per_rank(self.size))}
        for rank in range(1, self.size):
            stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
            self._stderr.append(stderr)
            process = subprocess.Popen(
                [sys.executable, "-m", "critic_train.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            self._processes.append(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already, which `lost_error` reports
                process.stdin.write(task)
                process.stdin.flush()

    def lost_error(self) -> MachineError | None:
        """The error of a worker that has ended without reporting one; None while all run."""
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
            output = self._end_of_stderr(rank)
            return MachineError(f"{whose} ended with exit code {code}" + (f":\n{output}" if output else ""))
        return None

    def _end_of_stderr(self, rank: int) -> str:
        file = self._stderr[rank - 1]
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace").strip()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for them to end; terminate, then kill those that do not."""
        until = time.monotonic() + (PATIENCE_SECONDS if error is None else PATIENCE_SECONDS / 6)
        for end in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in self._processes:
                if end is not None and process.poll() is None:
                    end(process)
                try:
                    process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        for process, stderr in zip(self._processes, self._stderr, strict=True):
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            stderr.close()


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(size: int) -> int:
    """Threads for each of `size` ranks on this machine."""
    return max(1, cores_here() // size)


def refuse_more_ranks(size: int, device: str) -> None:
    """Refuse more ranks than this machine has GPUs, or on CPUs cores, before one is started.

    Raises:
        MachineError: there are fewer.
    """
    there, what = (torch.cuda.device_count(), "CUDA devices") if on_cuda(device) else (cores_here(), "cores")
    if size > there:
        raise MachineError(
            f"--nproc {size}: this machine has {there} {what}",
            hint=f"--nproc {there} uses all of them" if there > 1 else "leave --nproc out",
        )


def open_store(rank: int, size: int, workers: Workers | None, timeout: timedelta) -> Store:
    """The store of all ranks; where rank 0 starts the others, it does so here.

    Args:
        rank: this process's number.
        size: number of ranks.
        workers: the ranks that rank 0 starts; None where the environment names them.
        timeout: how long the store waits for a key.

    Raises:
        MachineError: the environment does not say where rank 0 is.
    """
    if workers is not None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_rank(size))
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        workers.start(store.port)
        return PrefixStore("critic-train", store)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdecimal():
            raise MachineError(
                f"WORLD_SIZE is {size}, but MASTER_ADDR and MASTER_PORT do not say where rank 0 is",
                hint="start the ranks with torchrun, or set both on every machine",
            )
        store = dist.TCPStore(address, int(port), is_master=rank == 0, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        return PrefixStore("critic-train", store)
    elastic, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    return PrefixStore(f"critic-train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", elastic)
