"""Where and how the model computes."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from critic_train.distributed.ranks import SINGLE_PROCESS, Ranks, on_cuda
from critic_train.errors import ConfigError, MachineError
from critic_train.layers.kernel_choice import kernels_to_try
from critic_train.layers.sequence_parallel import SequenceRanks
from critic_train.model.model_input import StateSource
from critic_train.settings import (
    CPU_MAX_TOKENS,
    ActivationCheckpointing,
    Attention,
    ComputeSettings,
    Offload,
    Precision,
    TrainComputeSettings,
    offloads,
)

WITH_ACTIVATIONS: dict[Offload, Offload] = {
    "none": "activations",
    "optimizer": "optimizer+activations",
    "all": "all+activations",
}
"""--offload, and the same with the layer inputs."""


class Keeping(NamedTuple):
    """How much the forward pass keeps for the backward pass.

    Attributes:
        kind: of activation checkpointing, resolved: not auto.
        on_host: the layer inputs that it keeps wait in host memory.
    """

    kind: ActivationCheckpointing
    on_host: bool = False

    def __str__(self) -> str:
        return self.kind + (" with the layer inputs in host memory" if self.on_host else "")


class Cut(NamedTuple):
    """That rollouts may be cut over ranks before layer inputs go to host memory.

    Attributes:
        ranks: the most that cut one.
        reason: why that is cheaper, for a person.
    """

    ranks: int
    reason: str


@dataclass(slots=True, kw_only=True)
class Compute:
    """Device, precision and token budget of a job.

    Attributes:
        device: where the critic is.
        precision: what the trunk computes in, resolved: not auto. Weights, head and loss are float32 whatever it is.
        max_tokens: positions through the model at once, on each rank; lowered where memory runs out.
        ranks: the processes that compute together, of which this is one.
        checked_rollouts: how many rollouts the self-check tries at most; None for all that it is given.
        pair_cost: the work of one (query, key) pair of attention beside a position's, for sharing work out over ranks.
        states: hidden states of a frozen trunk that are given in place of tokens; None where the trunk computes.
        attention: the kernel that computes attention on a forest, resolved: not auto.
        frequency_limit: rollouts up to so many tokens and longer ones are never computed together; None where they may.
        one_row: padded rows go through the model one at a time, and are not padded.
        offload: what waits in host memory while it is not needed on the device.
        sequence: the ranks that cut the positions of each micro-batch among them, this one included; None where each
            rank computes micro-batches of its own.
        cut_as_they_come: cut trees as older runs do (see `tree_pieces`).
        keeping: how much is kept for the backward pass.
        may_keep_less: whether that may change while the run goes on: it chooses itself, and no layer is compiled.
        may_offload: whether layer inputs may come to wait in host memory then: --offload chooses itself.
        cut_first: that ranks cut rollouts before layer inputs go to host memory; None where they do not.
        keep_less: what may be tried where memory runs out on a single rollout, the fastest first.
        kept_less: whether that has happened.
        averages_weights: whether a run keeps an average of the trained weights, of their size.
    """

    device: torch.device
    precision: Precision
    max_tokens: int
    ranks: Ranks = SINGLE_PROCESS
    checked_rollouts: int | None = None
    pair_cost: float = 0.0
    states: StateSource | None = None
    attention: Attention = "sdpa"
    frequency_limit: int | None = None
    one_row: bool = False
    offload: Offload = "none"
    sequence: SequenceRanks | None = None
    cut_as_they_come: bool = False
    keeping: Keeping = Keeping("none")
    may_keep_less: bool = False
    may_offload: bool = False
    cut_first: Cut | None = None
    keep_less: tuple[Keeping, ...] = ()
    kept_less: bool = False
    averages_weights: bool = False
    _announced: int | None = field(default=None, repr=False, compare=False)
    _announced_keeping: Keeping | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._announced, self._announced_keeping = self.max_tokens, self.keeping

    @property
    def sequence_size(self) -> int:
        """How many ranks compute one micro-batch together."""
        return 1 if self.sequence is None else self.sequence.size

    @property
    def data_size(self) -> int:
        """How many micro-batches are computed at the same time."""
        return self.ranks.size // self.sequence_size

    @property
    def data_rank(self) -> int:
        """Which of them this rank computes, or computes a part of."""
        return self.ranks.rank // self.sequence_size

    def lowered(self) -> str:
        """A message for the user where less goes on at once than when this was last asked; else empty."""
        if self.kept_less and self._announced_keeping != self.keeping:
            self._announced_keeping = self.keeping
            return (
                f"memory ran out on a single rollout: from now on --activation-checkpointing {self.keeping}; the "
                "result is the same but for rounding"
            )
        if self._announced == self.max_tokens:
            return ""
        self._announced, before = self.max_tokens, self._announced
        return (
            f"memory ran out with {before:,} tokens at once: from now on {self.max_tokens:,}; the result is the same. "
            f"--max-tokens {self.max_tokens} starts there"
        )

    def keep(self, keeping: Keeping) -> None:
        """Note how much is kept from now on."""
        self.keeping = keeping
        if keeping.on_host and not offloads(self.offload, "activations"):
            self.offload = WITH_ACTIVATIONS[self.offload]

    def cheaper_cut(self, longest: int) -> str:
        """Why ranks cut the longest rollout before layer inputs go to host memory, as the rest of a sentence; or ""."""
        cut = self.cut_first
        if cut is None or not self.max_tokens < longest <= cut.ranks * self.max_tokens:
            return ""
        return f", and ranks cut the longest rollout before layer inputs go to host memory: {cut.reason}"

    def start_at(self, max_tokens: int) -> None:
        """Set `max_tokens` without a message from `lowered`."""
        self.max_tokens = self._announced = max_tokens

    def autocast(self) -> torch.autocast:
        """The context in which the trunk runs: bf16 matrix products from float32 weights, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def peak_memory_bytes(self) -> int:
        """The most memory held so far: the device's on CUDA, this process's resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resolve_compute(settings: ComputeSettings, ranks: Ranks = SINGLE_PROCESS) -> Compute:
    """What a command's settings ask for; attention is chosen later, on the model and some rollouts.

    So is the token budget of a GPU that is not given (see `automatic`): until then it is that of a CPU.

    Raises:
        ConfigError: torch does not know the device, or the attention does not exist for it.
        MachineError: this machine has no such device.
    """
    device = resolve_device(settings.device, ranks)
    precision = resolve_precision(settings.precision, device)
    kernels_to_try(settings.attention, device, precision)
    return Compute(
        device=device,
        precision=precision,
        max_tokens=settings.max_tokens or CPU_MAX_TOKENS,
        ranks=ranks,
        offload=resolve_offload(settings),
        may_keep_less=isinstance(settings, TrainComputeSettings)
        and settings.activation_checkpointing == "auto"
        and not settings.compile,
        may_offload=isinstance(settings, TrainComputeSettings) and settings.offload == "auto",
    )


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """auto -> bf16 on a CUDA device that computes in it (compute capability 8.0 or more), else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def resolve_offload(settings: ComputeSettings) -> Offload:
    """What a run keeps in host memory: on a CPU, which has no other, nothing in particular.

    auto is nothing until the critic is there to be measured (see `automatic.choose_offload`).
    """
    if not isinstance(settings, TrainComputeSettings) or not on_cuda(settings.device) or settings.offload == "auto":
        return "none"
    return settings.offload


def resolve_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """`auto` -> cuda where there is one, else cpu; any other name as torch reads it.

    Of several ranks each gets a CUDA device of its own.

    Raises:
        ConfigError: torch does not know the name, or several ranks are to share one CUDA device.
        MachineError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and name.startswith("cuda:"):
        raise ConfigError(
            f"--device {name} cannot be shared by {ranks.size} ranks", hint="--device cuda gives each rank its own"
        )
    if ranks.size > 1 and name == "cuda":
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device", hint="auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not supported", hint="auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", hint="--device cpu"
        )
    return _set_cuda_device(device) if device.type == "cuda" else device


def _set_cuda_device(device: torch.device) -> torch.device:
    """Make a CUDA device this process's present one, which FSDP2 and Triton take; returns it with its index.

    cuDNN's attention is turned off for the process: on Hopper it is preferred for bf16 with a mask, where gradients
    that are not finite have been reported (pytorch/pytorch#196678).
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device
