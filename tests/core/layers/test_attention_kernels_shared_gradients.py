"""In bf16, the gradients of a prompt's keys and values are as exact with 64 rollouts as with one: they are summed in
float32. The yardstick is plain attention in float64 on the same rounded numbers."""

import numpy as np
import pytest
import torch
from attention_cases import CPU, operators_by_hand, plain
from support import rollouts_of
from torch.utils._python_dispatch import TorchDispatchMode

from critic_train.layers.attention_kernel import Scoring, all_queries
from critic_train.layers.cuda_kernels import VarlenKernel
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.layers.sdpa_kernels import CpuFlashKernel, SdpaKernel

KERNELS = {
    "tiles": CpuFlashKernel,
    "sdpa": lambda queries: SdpaKernel(queries, CPU),
    "varlen": lambda queries: VarlenKernel(queries, CPU, operators=operators_by_hand()),
}
PROMPT, RESPONSE, HEADS, KV_HEADS, WIDTH = 24, 6, 4, 2, 16


def error_of_the_prompt(kernel: str, responses: int) -> float:
    """Of its keys' and values' gradients: the norm of the difference, relative to the exact norm."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 100, PROMPT)
    rows = [np.concatenate([prompt, draw.integers(0, 100, RESPONSE)]).astype(np.int32) for _ in range(responses)]
    rollouts = rollouts_of(rows, [PROMPT] * responses)
    layout = build_tree_layout(rollouts, prefix_order(rollouts))
    size = len(layout)
    torch.manual_seed(0)
    drawn = [torch.randn(1, heads, size, WIDTH).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    # Responses pull a prompt to one side, as gradients of one loss do: what is summed does not cancel.
    slope = (torch.randn(1, 1, HEADS, WIDTH) + 0.5 * torch.randn(1, size, HEADS, WIDTH)).bfloat16()

    def gradients(attend, dtype: torch.dtype) -> torch.Tensor:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in drawn]
        _, *of_prompt = torch.autograd.grad(attend(inputs), inputs, slope.to(dtype))
        return torch.cat([part[:, :, :PROMPT].double() for part in of_prompt])

    exact = gradients(lambda inputs: plain(layout, np.arange(size), Scoring(), tuple(inputs)), torch.float64)
    actual = gradients(lambda inputs: KERNELS[kernel](all_queries(layout))(*inputs, Scoring()), torch.bfloat16)
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("kernel", KERNELS)
def test_sixty_four_rollouts_of_a_prompt_round_no_more_than_one(kernel):
    assert error_of_the_prompt(kernel, 64) <= 1.2 * error_of_the_prompt(kernel, 1)


def test_varlen_sums_in_float32():
    """On a CPU index_add_ sums bf16 exactly enough; on CUDA it rounds at every addition."""
    summed = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "index_add" in str(func):
                summed.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Sums():
        error_of_the_prompt("varlen", 2)
    assert summed == [torch.float32] * 2
