"""Errors that a user can cause or correct. Each says what happened, where, and what to do about it.

The command line maps each class to an exit code; the library itself never exits and never prints.
"""


class CriticTrainError(Exception):
    """Base of the errors that are reported without a traceback.

    Args:
        message: what was found, where, and what was expected; one or a few plain lines.
        hint: what to do about it, or an empty string.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(CriticTrainError):
    """The command or its configuration is wrong (a flag, a config file, a changed setting)."""


class DataError(CriticTrainError):
    """The rollouts cannot be used as they are."""


class ModelError(CriticTrainError):
    """The model or checkpoint cannot be used."""


class DivergedError(CriticTrainError):
    """The loss or a gradient stopped being finite."""


class MachineError(CriticTrainError):
    """Disk, memory, lock or device: the machine, not the command, is in the way."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory_hint(message: str) -> str:
    """What to do where memory ran out.

    Args:
        message: of the error. torch's own says "CUDA out of memory"; CUDA's, "CUDA error: out of memory", is about what
            torch does not share out: the host's memory that is to be page-locked, or a device that others fill.
    """
    if message.startswith("CUDA error"):
        return (
            "the host could not page-lock memory (a container's limit, free -g), or other processes fill the device "
            "(nvidia-smi); where neither is so, lower --max-tokens"
        )
    return "lower --max-tokens (it never changes the result), or use --precision bf16"
