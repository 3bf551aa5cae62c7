#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# The indexer of DeepSeek-V3.2's sparse attention scores a key by a sum of ReLUs over its heads, and takes the index_topk
# best. Keys that no head likes have a score of exactly 0, so there are ties, and which of them torch.topk takes depends
# on the width of the row. So the hidden state of a token changes when tokens are appended after it, or padding: the model
# is causal on paper, and its values leak the length of what follows.
#
# Output seen:
#   index_topk 64: appending 16 tokens changes the states before them by up to 0.0e+00
#   index_topk 32: appending 16 tokens changes the states before them by up to 5.2e-01
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModel, DeepseekV32Config
from transformers.utils import logging

logging.set_verbosity_error()


@torch.no_grad()
def change(index_topk):
    """The largest change of the first 48 states of a row of 64 tokens when its last 16 are missing."""
    config = DeepseekV32Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=100, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1,
        topk_group=1, index_topk=index_topk, index_head_dim=16, index_n_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    row = torch.randint(3, 100, (1, 64))
    whole, part = (model(ids, use_cache=False).last_hidden_state[0, :48] for ids in (row, row[:, :48]))
    return float((whole - part).abs().max())


dense, sparse = change(64), change(32)
print(f"index_topk 64: appending 16 tokens changes the states before them by up to {dense:.1e}")
print(f"index_topk 32: appending 16 tokens changes the states before them by up to {sparse:.1e}")
assert dense < 1e-5
assert sparse > 1e-3
PYTHON
