#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# transformers' scan of Mamba-2 casts its inputs to float32, and so does its gated delta rule. Under autocast to bf16 the delta
# rule returns its final state in float32; Mamba-2's state comes back in bf16, because it is the result of an einsum. Who hands
# it on from piece to piece of a sequence rounds it to 8 bits at every border. A cache in bf16 does the same.
#
# Output seen:
#   without autocast: Mamba-2 torch.float32, gated delta rule torch.float32
#   under autocast: Mamba-2 torch.bfloat16, gated delta rule torch.float32
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
from transformers.utils import logging

logging.set_verbosity_error()
torch.manual_seed(0)
x, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
dt = torch.rand(1, 64, 2)


def states():
    """The dtypes of the two final states."""
    _, mamba = mamba2_chunk_scan(x, dt, -torch.ones(2), k, k, chunk_size=32, return_final_states=True)
    _, delta = torch_chunk_gated_delta_rule(x, k, x, g=-dt, beta=dt, output_final_state=True)
    return mamba.dtype, delta.dtype


plain = states()
with torch.autocast("cpu", torch.bfloat16):
    rounded = states()
print(f"without autocast: Mamba-2 {plain[0]}, gated delta rule {plain[1]}")
print(f"under autocast: Mamba-2 {rounded[0]}, gated delta rule {rounded[1]}")
assert plain == (torch.float32, torch.float32)
assert rounded == (torch.bfloat16, torch.float32)
PYTHON
