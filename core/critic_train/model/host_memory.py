"""Host memory that waits on a device's behalf: page-locked buffers, and checkpointed layer inputs kept in them."""

import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from critic_train.errors import MachineError
from critic_train.text import format_bytes


class _PageLockedMemory(mmap.mmap):
    """Anonymous memory that CUDA has page-locked; it is unlocked before it is given back."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def page_locked_zeros(shape: Sequence[int], what: str, hint: str) -> Tensor:
    """float32 zeros in page-locked memory of exactly their size, rounded up to pages.

    torch's own pinned memory comes in powers of two: the moments of a 7B model are 53 GiB and would take 100.

    Args:
        shape: not of an empty tensor.
        what: the use of it, and
        hint: what to do where the host cannot lock so much, for the message.

    Raises:
        MachineError: the host cannot lock so much memory.
    """
    size = 4 * math.prod(shape)
    memory = _PageLockedMemory(-1, size)
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(tuple(shape))
    runtime: Any = torch.cuda.cudart()
    status = runtime.cudaHostRegister(tensor.data_ptr(), size, 0)
    if int(status):
        raise MachineError(
            f"{format_bytes(size)} of host memory cannot be page-locked for {what}: "
            f"{runtime.cudaGetErrorString(status)}",
            hint=f"raise the machine's limit (ulimit -l, a container's memory), or {hint}",
        )
    memory.address = tensor.data_ptr()
    return tensor


class _Waiting:
    """A tensor on its way to the host, there, or on its way back.

    Attributes:
        shape, dtype, device: of the tensor.
        before: the one that went before it, which the backward pass asks for next; a weak reference.
        leaving: the tensor, until its copy is there.
        copied: the event after which its copy is there; None on a CPU.
        arriving: the tensor that its copy is being brought to.
        arrived: the event after which it is there.
    """

    def __init__(self, tensor: Tensor, buffer: Tensor, before: "weakref.ref[_Waiting] | None") -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.leaving: Tensor | None = tensor
        self.copied: Any = None
        self.arriving: Tensor | None = None
        self.arrived: Any = None
        self.before = before
        self._buffer = buffer

    @property
    def copy(self) -> Tensor:
        """In host memory."""
        return (
            self._buffer.view(torch.uint8)[: self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)
        )


class HostActivations:
    """Layer inputs that activation checkpointing keeps, in host memory between forward and backward.

    A copy to the host runs beside the computation of the layer, and the copy back beside the backward pass of the
    layer above (FPDT, Yao et al. 2024, arXiv 2408.16978, and Arctic's long-sequence training, arXiv 2506.13996, do the
    same). Buffers are used again for the next micro-batch. On a CPU all happens in order.

    Args:
        device: where the trunk is.
    """

    def __init__(self, device: torch.device) -> None:
        self._free: list[Tensor] = []
        self._largest = 0
        self._leaving: _Waiting | None = None
        self._newest: weakref.ref[_Waiting] | None = None
        self._streams: dict[str, Any] = {}
        if device.type == "cuda":
            self._streams = {"out": torch.cuda.Stream(device), "in": torch.cuda.Stream(device)}

    def around(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """Call a layer within its checkpoint; what the checkpoint keeps of its arguments waits on the host."""
        with torch.autograd.graph.saved_tensors_hooks(self._send, self._fetch):
            return checkpoint(function, *args)

    def _send(self, tensor: Tensor) -> "_Waiting | Tensor":
        # torch 2.11's checkpoint also keeps an empty tensor, for which no host memory can be locked.
        if not tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter) or not tensor.numel():
            return tensor
        self._let_go()
        waiting = _Waiting(tensor.detach(), buffer := self._buffer(tensor.nbytes), self._newest)
        weakref.finalize(waiting, self._free.append, buffer)
        with self._on("out"):
            waiting.copy.copy_(tensor.detach(), non_blocking=True)
            waiting.copied = self._event("out")
        self._leaving, self._newest = waiting, weakref.ref(waiting)
        return waiting

    def _fetch(self, waiting: "_Waiting | Tensor") -> Tensor:
        if isinstance(waiting, Tensor):
            return waiting
        if waiting.leaving is None:
            self._bring(waiting)
        tensor = waiting.arriving if waiting.leaving is None else waiting.leaving
        if waiting.arrived is not None:
            torch.cuda.current_stream(waiting.device).wait_event(waiting.arrived)
        waiting.arriving = None
        self._let_go()
        before = waiting.before() if waiting.before is not None else None
        if before is not None:
            self._bring(before)
        assert tensor is not None
        return tensor

    def _bring(self, waiting: _Waiting) -> None:
        """Begin to copy one back."""
        if waiting.arriving is not None or waiting.leaving is not None:
            return
        waiting.arriving = torch.empty(waiting.shape, dtype=waiting.dtype, device=waiting.device)
        with self._on("in"):
            if waiting.copied is not None:
                self._streams["in"].wait_event(waiting.copied)
            waiting.arriving.copy_(waiting.copy, non_blocking=True)
            waiting.arrived = self._event("in")

    def _let_go(self) -> None:
        """Free the device's memory of the tensor that left last: from here on, what is queued waits for its copy."""
        if self._leaving is not None:
            if self._leaving.copied is not None:
                torch.cuda.current_stream(self._leaving.device).wait_event(self._leaving.copied)
            self._leaving.leaving = None
        self._leaving = None

    def _buffer(self, size: int) -> Tensor:
        """Host memory of at least so many bytes, as float32."""
        if size > self._largest:
            self._largest = size
            self._free.clear()
        fitting = [number for number, buffer in enumerate(self._free) if buffer.nbytes >= size]
        if fitting:
            buffer = self._free.pop(fitting[-1])
            if self._streams:  # its last copy may still be on its way to the device
                self._streams["out"].wait_stream(self._streams["in"])
            return buffer
        self._free.clear()  # those that a smaller micro-batch had
        numbers = -(-self._largest // 4)
        if not self._streams:
            return torch.empty(numbers, dtype=torch.float32)
        return page_locked_zeros(
            (numbers,),
            "the inputs of checkpointed layers",
            "leave out --offload activations, or take a lower --max-tokens",
        )

    def _on(self, stream: str) -> AbstractContextManager[Any]:
        """The stream, which waits for what is queued so far: that may still use the memory in question."""
        if not self._streams:
            return nullcontext()
        self._streams[stream].wait_stream(torch.cuda.current_stream(self._streams[stream].device))
        return torch.cuda.stream(self._streams[stream])

    def _event(self, stream: str) -> Any:
        return self._streams[stream].record_event() if self._streams else None
