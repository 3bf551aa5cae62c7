"""How memory and speed are traded while training."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting

ActivationCheckpointing = Literal["none", "layer", "selective"]
Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Part of `fit`."""

    activation_checkpointing: ActivationCheckpointing = setting(
        "none",
        "Keep only each layer's input and compute the rest again (layer), or all but half of the matrix products and "
        "attention (selective): less memory, more time.",
        panel="Compute",
    )
    offload: Offload = setting(
        "none",
        "What waits in host memory instead of the GPU's: AdamW's two moments, updated on the GPU (optimizer), or "
        "weights and gradients as well, updated on the host (all).",
        panel="Compute",
    )
    compile: bool = setting(
        False, "Compile the layers with torch.compile: slow to start, faster on a GPU.", panel="Compute"
    )

    def faults(self) -> list[str]:
        """See Settings."""
        if self.compile and self.activation_checkpointing == "selective":
            return [
                "--compile does not go with --activation-checkpointing selective, which picks single operations that "
                "a compiled layer no longer has: none or layer"
            ]
        return []
