"""A CUDA device of fake tensors, under a CPU build of torch: shapes, dtypes and devices, and no numbers.

What mixes devices or dtypes raises, as it would on a GPU; what the host reads of the device is noted, and answered with
ones. The library made of guard.cpp must be loaded before torch, and in a process of its own, for torch is changed.
"""

import collections
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

reads: collections.Counter[str] = collections.Counter()
"""Module and function of critic_train -> how often it read numbers of the device."""


def pretend() -> None:
    """Have torch take the device for there."""
    import torch.cuda.amp.common as amp

    amp.amp_definitely_not_available = lambda: False
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # pinned or not is the same to a fake
    plain = {name: getattr(torch.Tensor, name) for name in ("cpu", "__float__", "item", "tolist")}

    def noted(name: str) -> Any:
        def read(tensor: torch.Tensor, *args: Any) -> Any:
            if not isinstance(tensor, FakeTensor) or tensor.device.type == "cpu":
                return plain[name](tensor, *args)
            reads[_reader()] += 1
            with unset_fake_temporarily():
                return plain[name](torch.ones(tuple(tensor.shape), dtype=tensor.dtype), *args)

        return read

    for name in plain:
        setattr(torch.Tensor, name, noted(name))


class FakeDevice(FakeTensorMode):
    """Within it, what is made on "cuda" is fake; tensors of the CPU stay real among themselves."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on real tensors, or propagate shapes, dtypes and devices."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and (
            device is None or torch.device(device).type == "cpu"
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        args, kwargs = tree_map(self._as_fake, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _as_fake(self, value: Any) -> Any:
        return (
            self.from_tensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else value
        )


@contextlib.contextmanager
def counted_reads() -> Iterator[collections.Counter[str]]:
    """What the host reads of the device within the block."""
    reads.clear()
    yield reads


def move(module: torch.nn.Module) -> None:
    """Put fake parameters and buffers on the device in place of a module's own; within a `FakeDevice`."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    held[name] = torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake


def _reader() -> str:
    frames = [frame for frame in traceback.extract_stack() if "critic_train/" in frame.filename]
    return f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "elsewhere"
