#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# The chunk size of Mamba-2 (256 in the configs as published) looks like a setting of the fast kernels. Without mamba-ssm,
# transformers' own scan pads every row to a multiple of it and makes scores of chunk size x chunk size for every head: rows
# of 64 tokens take many times what they take with a chunk of 32, and more than rows of 256 tokens would. The output is the
# same but for rounding.
#
# Output seen (one thread, forward and backward, 16 rows of 64 tokens, 8 heads of 64, state 64):
#   outputs differ by 3.2e-07 of the largest
#   chunk 256 takes 13.2 times the time of chunk 32
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import time

import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
torch.manual_seed(0)
ROWS, TOKENS, HEADS, HEAD, STATE = 16, 64, 8, 64, 64
x = torch.randn(ROWS, TOKENS, HEADS, HEAD, requires_grad=True)
b, c = (torch.randn(ROWS, TOKENS, 1, STATE, requires_grad=True) for _ in range(2))
dt, a = torch.rand(ROWS, TOKENS, HEADS, requires_grad=True), -torch.rand(HEADS)


def seconds(chunk):
    """(the output, the least of three times)."""
    times = []
    for _ in range(4):
        began = time.process_time()
        output = mamba2_chunk_scan(x, dt, a, b, c, chunk_size=chunk)
        output.sum().backward()
        times.append(time.process_time() - began)
    return output.detach(), min(times[1:])


long, slow = seconds(256)
short, fast = seconds(32)
difference = float((long - short).abs().max() / short.abs().max())
print(f"outputs differ by {difference:.1e} of the largest")
print(f"chunk 256 takes {slow / fast:.1f} times the time of chunk 32")
assert difference < 1e-4
assert slow > 4 * fast
PYTHON
