"""Where and how a model computes."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting, too_small

Packing = Literal["auto", "forest", "rows"]
Attention = Literal["auto", "sdpa", "flex", "varlen"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Settings):
    """Part of every command that runs a model."""

    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, ...", panel="Compute")
    precision: Precision = setting(
        "fp32", "Compute precision; weights, head and loss stay in float32.", panel="Compute"
    )
    packing: Packing = setting(
        "auto", "Lay rollouts out as a forest of shared prefixes, or as padded rows.", panel="Compute"
    )
    attention: Attention = setting(
        "auto",
        "How attention is computed on a forest: torch's scaled-dot-product attention, FlexAttention or "
        "variable-length attention (both CUDA); auto takes the best that is right on the device.",
        panel="Compute",
    )
    max_tokens: int = setting(
        4096, "Tokens through the model at once; bounds memory, never changes the result.", panel="Compute"
    )

    def faults(self) -> list[str]:
        """See Settings."""
        return too_small(self, 1, "max_tokens")
