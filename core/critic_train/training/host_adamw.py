"""AdamW whose moments are kept in host memory and copied to the device only to be updated.

Two moments are 8 bytes a parameter, half of what float32 training keeps between steps, and are needed for an instant
of each step. They come in pieces of a fixed size: while one is updated, the next is on its way in and the one before
on its way out (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840, moves the update to the host instead; here it stays
on the device, in the same kernel, so that the result is that of AdamW to the bit).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from critic_train.model.host_memory import page_locked_zeros
from critic_train.model_files.tensor_file import part_here

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**25
"""Numbers of each moment that are copied together: 128 MiB a moment, 512 MiB on the device for all copies in flight."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some numbers of one parameter, in a row.

    Attributes:
        parameter, gradient: on the device.
        moments: of the same numbers, on the host.
        step: steps taken so far, 0-d float32; the update counts it up.
    """

    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    step: Tensor


class HostAdamW(torch.optim.AdamW):
    """Fused AdamW, moments on the host (pinned where there is CUDA). Parameters may be spread over ranks by FSDP2.

    Args:
        groups: parameter groups, on one device.
        piece: how many numbers are copied to the device together.
    """

    def __init__(self, groups: list[dict[str, Any]], piece: int = PIECE) -> None:
        super().__init__(groups, fused=True)
        self._piece = piece
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.contiguous()  # fused AdamW needs it; some architectures transpose

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A step count beside the parameter, and moments of its shape, spread as it is, in host memory."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        return state | {name: self._moment(parameter) for name in MOMENTS}

    @torch.no_grad()
    def _moment(self, parameter: Tensor) -> Tensor:
        moment = torch.zeros_like(parameter, device="cpu", requires_grad=False, memory_format=torch.contiguous_format)
        local = part_here(moment)
        if parameter.device.type == "cuda" and local.numel():
            local.data = page_locked_zeros(
                local.shape,
                "the optimizer's moments",
                "use --optimizer adamw-8bit, which needs 2 bytes a trained parameter on the device (they are 8 here)",
            )
        return moment

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; when it returns, the moments are back on the host."""
        assert closure is None
        visits = [(group, parts) for group in self.param_groups for parts in self._visits(group)]
        if not visits:
            return
        largest = max(sum(part.parameter.numel() for part in parts) for _, parts in visits)
        traffic = _Traffic(visits[0][1][0].parameter.device, largest)
        traffic.bring(0, visits[0][1])
        for number, (group, parts) in enumerate(visits):
            if number + 1 < len(visits):
                traffic.bring(number + 1, visits[number + 1][1])
            here = traffic.arrived(number)
            _update(group, parts, here)
            traffic.take_back(number, parts, here)
        traffic.end()

    def _visits(self, group: dict[str, Any]) -> Iterator[list[Part]]:
        """The parts of a group's parameters, as many together as make a piece."""
        together: list[Part] = []
        held = 0
        for part in self._parts(group):
            if together and held + part.parameter.numel() > self._piece:
                yield together
                together, held = [], 0
            together.append(part)
            held += part.parameter.numel()
        if together:
            yield together

    def _parts(self, group: dict[str, Any]) -> Iterator[Part]:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= self.new_state(parameter)
            own = part_here(parameter)
            flat, gradient = own.view(-1), part_here(parameter.grad).reshape(-1)
            first, second = (part_here(state[name]).view(-1) for name in MOMENTS)
            # One that is empty on this rank counts its steps all the same.
            for start in range(0, max(1, own.numel()), self._piece):
                cut = slice(start, start + self._piece)
                last = start + self._piece >= own.numel()
                step = state["step"] if last else state["step"].clone()
                yield Part(flat[cut], gradient[cut], (first[cut], second[cut]), step)


def _update(group: dict[str, Any], parts: list[Part], moments: list[list[Tensor]]) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [part.parameter for part in parts],
        [part.gradient for part in parts],
        moments[0],
        moments[1],
        [],
        [part.step for part in parts],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


class _Traffic:
    """Copies to the device and back, each way on a stream of its own, into two buffers in turn.

    On a CPU all happens in order; there is nothing to wait for.

    Args:
        device: where the update is.
        size: numbers of the largest visit, of each moment.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._buffers = torch.empty(2, len(MOMENTS), size, dtype=torch.float32, device=device)
        self._here: dict[int, list[list[Tensor]]] = {}
        self._events: dict[tuple[str, int], Any] = {}
        self._streams: dict[str, Any] = {}
        if device.type == "cuda":
            update = torch.cuda.current_stream(device)
            self._streams = {"update": update, "in": torch.cuda.Stream(device), "out": torch.cuda.Stream(device)}
            # What was queued before may still use the memory that the buffers were given.
            self._streams["in"].wait_stream(update)

    def bring(self, number: int, parts: list[Part]) -> None:
        """Begin to copy a visit's moments to the device, once the one before the last has left its buffer."""
        here: list[list[Tensor]] = [[], []]
        with self._on("in"):
            self._await("in", "out", number - 2)
            for moment, arriving in enumerate(here):
                begin = 0
                for part in parts:
                    buffer = self._buffers[number % 2, moment, begin : begin + part.parameter.numel()]
                    arriving.append(buffer.copy_(part.moments[moment], non_blocking=True))
                    begin += part.parameter.numel()
            self._record("in", number)
        self._here[number] = here

    def arrived(self, number: int) -> list[list[Tensor]]:
        """For each moment, the visit's tensors on the device; what is queued from now on finds them there."""
        self._await("update", "in", number)
        return self._here.pop(number)

    def take_back(self, number: int, parts: list[Part], here: list[list[Tensor]]) -> None:
        """Begin to copy a visit's moments back, once they are updated."""
        self._record("update", number)
        with self._on("out"):
            self._await("out", "update", number)
            for moment, tensors in enumerate(here):
                for part, tensor in zip(parts, tensors, strict=True):
                    part.moments[moment].copy_(tensor, non_blocking=True)
            self._record("out", number)

    def end(self) -> None:
        """Wait until all moments are back."""
        if self._streams:
            self._streams["out"].synchronize()

    def _on(self, stream: str) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[stream]) if self._streams else nullcontext()

    def _record(self, stream: str, number: int) -> None:
        if self._streams:
            self._events[stream, number] = self._streams[stream].record_event()

    def _await(self, stream: str, other: str, number: int) -> None:
        """Have a stream wait until another is through with a visit."""
        if (other, number) in self._events:
            self._streams[stream].wait_event(self._events.pop((other, number)))
