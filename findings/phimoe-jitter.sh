#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# `router_jitter_noise` of Phi-3.5-MoE is no noise that training alone reads. Its router takes the number as a threshold,
# in evaluation mode too: who turns noise off by setting it to 0 gets another model. In Mixtral the key of the same name
# is the amplitude of a noise of training mode, and nothing else.
#
# Output seen:
#   phimoe: evaluation with router_jitter_noise 0 differs from that with 0.01 by 2.7e+00
#   mixtral: evaluation with router_jitter_noise 0 differs from that with 0.01 by 0.0e+00
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModel, MixtralConfig, PhimoeConfig
from transformers.utils import logging

logging.set_verbosity_error()


@torch.no_grad()
def states(kind, jitter):
    config = kind(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=jitter,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model(torch.randint(3, 512, (1, 256)), use_cache=False).last_hidden_state


def difference(kind):
    """The largest difference between evaluation with two values of the key."""
    change = float((states(kind, 0.01) - states(kind, 0.0)).abs().max())
    print(f"{kind.model_type}: evaluation with router_jitter_noise 0 differs from that with 0.01 by {change:.1e}")
    return change


assert difference(PhimoeConfig) > 1e-2
assert difference(MixtralConfig) == 0.0
PYTHON
