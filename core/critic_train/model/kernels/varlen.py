"""Attention through variable-length flash attention: CUDA, half precision.

Every run of queries is a sequence; its keys are its path from the root, gathered. The kernel aligns its causal mask at
the lower right, where the last query meets the last key, which is what a run at the end of its path needs; a window
then counts in the rollout. The price is one copy of the keys and values of every path.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from critic_train.model.kernels.queries import Queries
from critic_train.rollouts import offsets_of, spread


class Varlen:
    """A kernel (see `queries.Kernel`).

    Args:
        queries: who asks.
        device: where the trunk is.
        attend: called as `torch.nn.attention.varlen.varlen_attn` is, and by default that.

    Attributes:
        paths: int64 [K] on the device, the positions of all paths, run after run.
        query_offsets: int32 [runs + 1], the first query of each run.
        key_offsets: int32 [runs + 1], the first entry of `paths` of each run.
    """

    def __init__(self, queries: Queries, device: torch.device, attend: Callable[..., Any] | None = None) -> None:
        pieces = np.asarray([piece for run in queries.runs for piece in run.path], dtype=np.int64)
        own = np.asarray([run.queries[1] - run.queries[0] for run in queries.runs], dtype=np.int64)
        path = np.asarray([sum(stop - start for start, stop in run.path) for run in queries.runs], dtype=np.int64)
        self.paths = torch.from_numpy(spread(pieces[:, 0], pieces[:, 1] - pieces[:, 0])).to(device)
        self.query_offsets = torch.from_numpy(offsets_of(own).astype(np.int32)).to(device)
        self.key_offsets = torch.from_numpy(offsets_of(path).astype(np.int32)).to(device)
        self._longest = int(own.max()), int(path.max())
        self._attend = attend or _varlen_attn()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        flat = query[0].transpose(0, 1)
        keys = key[0].transpose(0, 1).index_select(0, self.paths)
        values = value[0].transpose(0, 1).index_select(0, self.paths)
        output: Tensor = self._attend(
            flat.contiguous(),
            keys,
            values,
            self.query_offsets,
            self.key_offsets,
            *self._longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[None]


def available(device: torch.device) -> bool:
    """Whether torch has variable-length attention and the device can run it (compute capability 8.0 on)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _varlen_attn()
    except ImportError:
        return False
    return True


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return varlen_attn
    return partial(_unasked, varlen_attn)


def _unasked(attend: Callable[..., Any], *arguments: Any, enable_gqa: bool, **more: Any) -> Any:
    """Up to torch 2.11 the kernel shares heads of keys among those of queries whenever there are fewer of them."""
    return attend(*arguments, **more)
