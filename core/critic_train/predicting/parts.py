"""Several processes on one data set: each takes every N-th file."""

import os

import torch

from critic_train.errors import ConfigError
from critic_train.settings import PredictSettings
from critic_train.settings.predict import part_of


def part_of_this_process(settings: PredictSettings) -> tuple[int, int]:
    """(K, N) of `--part`, else of torchrun's RANK and WORLD_SIZE, else (1, 1).

    Raises:
        ConfigError: whitening was asked for, which needs the advantages of all files in one process.
    """
    named = part_of(settings.part) if settings.part else None
    part = named or (int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1")))
    if settings.whiten_advantages and part[1] > 1:
        raise ConfigError(
            f"--whiten-advantages needs all files in one process, and this is part {part[0]} of {part[1]}",
            hint="write the advantages as they are; whiten where they are used, over each batch",
        )
    return part


def device_of(name: str) -> str:
    """`auto` under torchrun -> this process's own GPU; any other name as it is."""
    local = os.environ.get("LOCAL_RANK")
    if name == "auto" and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return name
