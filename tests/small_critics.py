"""Values of an exported directory by code that is not critic-train's: by the names, with transformers' trunk alone.

critic_of(family)       a small critic whose head is not at its start
token_ids()             sequences
values_of(critic)       float32 [n, T - 1], by the formula h w + b over the trunk's hidden states
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from support import VOCABULARY, small_config

from critic_train.model.critic import Critic
from critic_train.model.trial import use_stock_attention
from critic_train.weights.loading import build_critic

BIAS = 0.25
THETA = 1e6


def critic_of(family: str, bias: float = BIAS) -> Critic:
    """A critic with a drawn head, and rotary frequencies that are not the default."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}} if family in ("Llama", "Qwen3") else {}
    critic = build_critic(small_config(family, **rope), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(bias)
    return critic.eval()


def token_ids() -> torch.Tensor:
    """int64 [3, 21]."""
    return torch.from_numpy(np.random.default_rng(3).integers(1, VOCABULARY, (3, 21)))


@torch.no_grad()
def values_of(critic: Critic) -> torch.Tensor:
    """float32 [3, 20]."""
    use_stock_attention(critic)
    states = critic.trunk(input_ids=token_ids(), use_cache=False).last_hidden_state
    return (states @ critic.head.weight.T + critic.head.bias)[:, :-1, 0]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def config_of(directory: Path) -> dict[str, object]:
    """Its config.json."""
    return json.loads((directory / "config.json").read_text())  # type: ignore[no-any-return]
