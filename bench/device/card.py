"""What the machine is and what it can do at best: versions, matrix products, copies, launches."""

import os
import platform
import time
from collections.abc import Callable

import torch
import transformers

from bench.device.telling import tell


def run(quick: bool) -> None:
    """Tell it."""
    device = torch.device("cuda")
    free, total = torch.cuda.mem_get_info()
    tell(
        f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores",
        capability=torch.cuda.get_device_capability(),
    )
    size = 1024 if quick else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: left @ right)
    tell(f"bf16 product of {size} x {size}: {2 * size**3 / seconds / 1e12:.0f} TFLOP/s", seconds=seconds)
    numbers = torch.empty(2**20 if quick else 2**30, device=device)
    other = torch.empty_like(numbers)
    moved = 2 * numbers.numel() * 4
    seconds = timed(lambda: other.copy_(numbers))
    tell(f"copy on the device: {moved / seconds / 1e12:.2f} TB/s read and written", seconds=seconds)
    host = torch.empty(2**18 if quick else 2**27, pin_memory=True)
    there = torch.empty_like(host, device=device)
    for name, copy in {
        "to the device": lambda: there.copy_(host, non_blocking=True),
        "to the host": lambda: host.copy_(there, non_blocking=True),
    }.items():
        seconds = timed(copy)
        tell(f"copy {name}, pinned: {host.numel() * 4 / seconds / 1e9:.1f} GB/s", seconds=seconds)
    small = torch.zeros(8, device=device)
    began = time.perf_counter()
    for _ in range(2000):
        small.add_(1)
    tell(f"a launch costs the host {(time.perf_counter() - began) / 2000 * 1e6:.1f} microseconds")


def timed(work: Callable[[], object], rounds: int = 5) -> float:
    """Mean seconds of some work on the device, after one that does not count."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    torch.cuda.synchronize()
    return max((time.perf_counter() - began) / rounds, 1e-9)
