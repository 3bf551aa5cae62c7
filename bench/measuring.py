"""Timing things that are compared: in turn, several rounds, medians."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from bench.entry import Options


def machine(options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else _processor()
    return {
        "machine": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "size": options.size,
    }


def in_turn(
    things: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of every thing in every round, one round before them uncounted.

    CPU time; on CUDA wall time from one synchronisation to the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in things}
    clock = _wall if device is not None and device.type == "cuda" else time.process_time
    for number in range(rounds + 1):
        for name, thing in things.items():
            began = clock()
            thing()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _wall() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
