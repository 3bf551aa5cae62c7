"""Where and how the model computes."""

from dataclasses import dataclass

import torch

from critic_train.errors import ConfigError, MachineError
from critic_train.settings import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Device, precision and token budget of a job.

    Attributes:
        device: where the critic is.
        precision: what the trunk computes in. Weights, head and loss are float32 whatever it is.
        max_tokens: positions through the model at once.
    """

    device: torch.device
    precision: Precision
    max_tokens: int

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


def resolve_device(name: str) -> torch.device:
    """`auto` -> cuda where there is one, else cpu; any other name as torch reads it.

    Raises:
        ConfigError: torch does not know the name.
        MachineError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return device
