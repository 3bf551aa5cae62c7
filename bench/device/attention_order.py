"""The kernels of attention by themselves, and so the order in which `--attention auto` should try them."""

import importlib.util

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.functional import scaled_dot_product_attention

from bench.device.card import timed
from bench.device.telling import tell
from bench.drawing import Shape, draw
from bench.gpu_steps import pairs_of
from critic_train.layers.attention import KERNELS
from critic_train.layers.attention_kernel import Scoring, all_queries
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model.compute import resolve_device
from critic_train.settings import Attention

ORDER: tuple[Attention, ...] = ("varlen", "sdpa", "flex")
HEADS, KV_HEADS, HEAD_DIM = 12, 2, 128
SHAPES = {
    "8 responses of 4,096 on 4,096": Shape("", 4096, 4096, 4096, 8),
    "8 responses of 1,024 on 1,024": Shape("", 1024, 1024, 1024, 8),
    "64 responses of 256 on 512": Shape("", 512, 256, 256, 64),
}
QUICK = {"4 responses of 100 on 200": Shape("", 200, 100, 100, 4)}


def run(quick: bool) -> None:
    """Forward and backward of each kernel on each shape; what compiles comes last."""
    resolve_device("cuda")  # cuDNN is then not chosen for sdpa, as in a run
    for kernel in ORDER:
        for name, shape in (QUICK if quick else SHAPES).items():
            try:
                tell_kernel(kernel, name, shape)
            except Exception as error:
                tell(f"{kernel}, {name}: FAILED {type(error).__name__}: {str(error)[:200]}")
        if kernel == "varlen" and importlib.util.find_spec("flash_attn_interface"):
            tell("varlen by FlashAttention-3:")
            activate_flash_attention_impl("FA3")
            for name, shape in (QUICK if quick else SHAPES).items():
                tell_kernel("varlen", name, shape)
            restore_flash_attention_impl()
        if kernel == "sdpa":
            dense_blocks(512 if quick else 32_768, 128 if quick else 4096)


def tell_kernel(kernel: Attention, name: str, shape: Shape) -> None:
    """Its time, forward and with the backward pass."""
    rollouts = draw(shape, vocabulary=1000)
    layout = build_tree_layout(rollouts, prefix_order(rollouts))
    attend = KERNELS[kernel].build(all_queries(layout), torch.device("cuda"), False)
    query, key, value = drawn(len(layout), (HEADS, KV_HEADS, KV_HEADS))
    slope = torch.randn(1, len(layout), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    forward = timed(lambda: attend(query, key, value, Scoring()), 3)
    both = timed(lambda: torch.autograd.grad(attend(query, key, value, Scoring()), (query, key, value), slope), 3)
    once = 4 * HEADS * HEAD_DIM * pairs_of(layout.depth)
    tell(
        f"{kernel}, {name}: forward {forward * 1e3:.2f} ms ({once / forward / 1e12:.0f} TFLOP/s), with backward "
        f"{both * 1e3:.2f} ms ({3.5 * once / both / 1e12:.0f} TFLOP/s)",
        forward=forward,
        both=both,
    )


def dense_blocks(queries: int, keys: int) -> None:
    """All responses' queries over a prompt's keys, one dense block: what a cascade of kernels would be made of."""
    query, key, value = (drawn(length, (HEADS,))[0] for length in (queries, keys, keys))
    slope = torch.randn_like(query)
    once = 4 * HEADS * HEAD_DIM * float(queries) * keys
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                forward = timed(lambda: scaled_dot_product_attention(query, key, value), 3)
                both = timed(
                    lambda: torch.autograd.grad(
                        scaled_dot_product_attention(query, key, value), (query, key, value), slope
                    ),
                    3,
                )
        except RuntimeError as error:
            tell(f"dense block by {backend.name}: FAILED {str(error)[:200]}")
            continue
        tell(
            f"dense block by {backend.name}: forward {once / forward / 1e12:.0f} TFLOP/s, with backward "
            f"{3.5 * once / both / 1e12:.0f}",
            forward=forward,
            both=both,
        )


def drawn(length: int, heads: tuple[int, ...]) -> list[torch.Tensor]:
    """Random bf16 tensors [1, heads, length, HEAD_DIM] that need gradients."""
    return [
        torch.randn(1, count, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in heads
    ]
