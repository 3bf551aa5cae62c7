"""What training starts from, and which part of it is trained."""

import re
from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting, too_small

Preset = Literal["tiny", "small", "base"]
LAST = re.compile(r"last-([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Part of `fit`."""

    model: str | None = setting(
        None,
        "Model to start from: a Hugging Face directory, a checkpoint or a run. Without it, --preset.",
        panel="Model",
        metavar="DIR",
    )
    preset: Preset = setting("small", "Size of the transformer trained from scratch without --model.", panel="Model")
    train: str = setting(
        "full",
        "What is trained: all of it, the value head, the head and the last K layers, or LoRA adapters and the head. "
        "A frozen trunk's hidden states are computed once and kept on disk.",
        panel="Model",
        metavar="full|head|last-K|lora",
    )
    lora_rank: int = setting(16, "Rank of the LoRA adapters.", panel="Model")
    lora_alpha: float = setting(32.0, "Scale of the LoRA adapters: their product counts alpha / rank.", panel="Model")

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [*too_small(self, 1, "lora_rank"), *too_small(self, 0, "lora_alpha")]
        if self.train not in ("full", "head", "lora") and not LAST.fullmatch(self.train):
            wrong.append(f"--train must be full, head, lora or last-K, as in last-2, not {self.train!r}")
        if self.train != "lora" and (self.lora_rank != 16 or self.lora_alpha != 32.0):
            wrong.append("--lora-rank and --lora-alpha belong to --train lora")
        if self.train != "full" and self.model is None:
            wrong.append(f"--train {self.train} needs --model: in a new transformer there is nothing worth freezing")
        return wrong


def trained_layers(train: str) -> int | None:
    """How many of the last layers are trained with the head: 0 for the head alone, None where no layer is frozen."""
    if train == "head":
        return 0
    last = LAST.fullmatch(train)
    return int(last[1]) if last else None
