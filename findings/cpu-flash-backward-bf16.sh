#!/usr/bin/env bash
# torch 2.13.0, numpy 2.3.5, one thread of an AMD EPYC (family 25, model 17) with avx512_bf16.
#
# On a CPU the backward pass of scaled_dot_product_attention takes several times as long in bf16 as in float32 wherever
# oneDNN multiplies bf16 without instructions for it, while the forward pass takes about the same in both. Here those
# instructions are withheld by ONEDNN_MAX_CPU_ISA; a machine that has them was seen at 41 ms nonetheless, the one below at 5.
# Casting queries, keys, values, output and gradient to float32 for the backward pass alone costs little where bf16 is
# fast and saves most of it where it is not, and sums gradients more exactly. And with is_causal=True up to 512 keys are
# all computed, those after a query as well: 384 positions in six calls, each with the keys up to its last query, take
# less than one call.
#
# Output seen:
#   384 positions, 4 heads of 64, causal, ONEDNN_MAX_CPU_ISA=AVX2: forward float32 1.9 ms, bf16 2.1 ms; backward float32 4.4 ms, bf16 30 ms
#   the same in six calls of 64 queries: forward 1.3 ms, backward 3.0 ms (float32)
#   384 positions, 4 heads of 64, causal, ONEDNN_MAX_CPU_ISA=ALL: forward float32 1.9 ms, bf16 2.0 ms; backward float32 4.5 ms, bf16 5 ms
#   the same in six calls of 64 queries: forward 1.3 ms, backward 2.9 ms (float32)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/measure.py" <<'PYTHON'
import os
import time

import torch

torch.set_num_threads(1)
attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LENGTH, BLOCK = 384, 64


def least(call):
    taken = []
    for _ in range(20):
        began = time.thread_time()
        call()
        taken.append(time.thread_time() - began)
    return 1000 * min(taken)


def milliseconds(dtype, block):
    """(forward, backward) of causal attention in calls of `block` queries with the keys up to the last of them."""
    query, key, value, slope = (torch.randn(1, LENGTH, 4, 64).transpose(1, 2).to(dtype) for _ in range(4))
    calls = []
    for stop in range(block, LENGTH + 1, block):
        rows = slice(stop - block, stop)
        seen = torch.ones(block, stop, dtype=torch.bool).tril(stop - block)
        mask = None if block == LENGTH else torch.zeros(block, stop, dtype=dtype).masked_fill(~seen, -torch.inf)
        parts = (query[:, :, rows], key[:, :, :stop], value[:, :, :stop])
        options = {"attn_mask": mask}
        output, lse = attend(*parts, 0.0, mask is None, **options)
        calls.append((parts, slope[:, :, rows], output, lse, mask is None, options))
    forward = least(lambda: [attend(*parts, 0.0, causal, **options) for parts, _, _, _, causal, options in calls])
    back = least(lambda: [backward(g, *parts, o, l, 0.0, causal, **options) for parts, g, o, l, causal, options in calls])
    return forward, back


one, rounded, six = milliseconds(torch.float32, LENGTH), milliseconds(torch.bfloat16, LENGTH), milliseconds(torch.float32, BLOCK)
isa = os.environ["ONEDNN_MAX_CPU_ISA"]
print(f"{LENGTH} positions, 4 heads of 64, causal, ONEDNN_MAX_CPU_ISA={isa}: forward float32 {one[0]:.1f} ms, "
      f"bf16 {rounded[0]:.1f} ms; backward float32 {one[1]:.1f} ms, bf16 {rounded[1]:.0f} ms")
print(f"the same in six calls of 64 queries: forward {six[0]:.1f} ms, backward {six[1]:.1f} ms (float32)")
assert six[1] < one[1]
assert isa == "ALL" or rounded[1] > 2 * one[1]
PYTHON
for isa in AVX2 ALL; do
  OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA="$isa" "$folder/env/bin/python" "$folder/measure.py"
done
