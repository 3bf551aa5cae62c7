"""Where the ranks of a run find each other: the store of torchrun, of MASTER_ADDR, or one that rank 0 opens."""

import os
from datetime import timedelta

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from critic_train.distributed.workers import Workers, threads_each
from critic_train.errors import MachineError


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
