"""Arrays of the host on the device that computes."""

import contextlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of an array's numbers. On a CPU it may share the array's memory.

    A copy from page-locked memory is queued on a CUDA device, and the host goes on. From any other memory it would wait
    until all that was queued before is computed; it is copied from there where the host can lock no more.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # CUDA error: out of memory
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
