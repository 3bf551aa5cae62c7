"""Outputs and gradients of the kernels of attention, against float64 on the CPU."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.device.telling import tell
from bench.drawing import Shape, draw
from critic_train.layers.attention import KERNELS
from critic_train.layers.attention_kernel import Scoring, all_queries
from critic_train.layers.prefix_tree import TreeLayout, build_tree_layout, prefix_order
from critic_train.layers.sdpa_kernels import SdpaKernel
from critic_train.model.compute import resolve_device
from critic_train.settings import Attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
SHAPES = {
    "8 responses on 1,024 tokens": Shape("", 1024, 700, 1024, 8),
    "64 responses on 512 tokens": Shape("", 512, 100, 128, 64),
}
QUICK = {"4 responses on 200 tokens": Shape("", 200, 100, 150, 4)}
WINDOW = 200


@dataclass(frozen=True)
class Case:
    """A kernel as it is asked."""

    kernel: Attention
    dtype: torch.dtype
    scoring: Scoring


CASES = [
    *(Case("varlen", torch.bfloat16, Scoring(window=window)) for window in (None, WINDOW)),
    *(Case("sdpa", dtype, Scoring()) for dtype in (torch.bfloat16, torch.float32)),
    Case("flex", torch.bfloat16, Scoring()),
    Case("flex", torch.float32, Scoring()),
    Case("flex", torch.bfloat16, Scoring(window=WINDOW, softcap=5.0)),
]
"""What compiles comes last."""


def run(quick: bool) -> None:
    """Every case on every shape."""
    device, exact = resolve_device("cuda"), dict[tuple[str, Scoring], list[Tensor]]()
    for case in CASES:
        for name, shape in (QUICK if quick else SHAPES).items():
            rollouts = draw(shape, vocabulary=1000)
            layout = build_tree_layout(rollouts, prefix_order(rollouts))
            key = name, case.scoring
            if key not in exact:
                exact[key] = computed(layout, replace(case, kernel="sdpa", dtype=torch.float64), torch.device("cpu"))
            compare(name, layout, case, exact[key], shape.prompt, device)


def compare(name: str, layout: TreeLayout, case: Case, exact: list[Tensor], prompt: int, device: torch.device) -> None:
    """Tell how far a kernel is off."""
    how = f"{case.kernel} {str(case.dtype).removeprefix('torch.')}, {case.scoring}, {name}, {len(layout)} positions"
    try:
        actual = computed(layout, case, device)
    except Exception as error:
        tell(f"{how}: FAILED {type(error).__name__}: {str(error)[:200]}")
        return
    off = [relative(a, b) for a, b in zip(actual, exact, strict=True)]
    shared = relative(actual[2][:, :, :prompt], exact[2][:, :, :prompt])
    finite = all(bool(tensor.isfinite().all()) for tensor in actual)
    shown = ", ".join(f"{what} {value:.1e}" for what, value in zip(("out", "dq", "dk", "dv"), off, strict=True))
    tell(f"{how}: {shown}, dk of the prompt {shared:.1e}" + ("" if finite else "; NOT FINITE"), off=off, prompt=shared)


def computed(layout: TreeLayout, case: Case, device: torch.device) -> list[Tensor]:
    """Output and gradients by query, key and value, float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    inputs = [torch.randn(1, heads, len(layout), HEAD_DIM, generator=generator) for heads in sizes]
    slope = torch.randn(1, len(layout), HEADS, HEAD_DIM, generator=generator)
    # Rounded to bf16 first, so that every kernel is given the same numbers.
    there = [t.bfloat16().to(device, case.dtype).requires_grad_() for t in inputs]
    queries, softcapped = all_queries(layout), case.scoring.softcap is not None
    exactly = case.dtype == torch.float64
    build = KERNELS[case.kernel].build
    kernel = SdpaKernel(queries, device) if exactly else build(queries, device, softcapped)
    output = kernel(there[0], there[1], there[2], case.scoring)
    gradients = torch.autograd.grad(output, there, slope.bfloat16().to(device, case.dtype))
    return [tensor.detach().cpu().double() for tensor in (output, *gradients)]


def relative(actual: Tensor, exact: Tensor) -> float:
    """The norm of a difference, relative to what is exact."""
    return float((actual - exact).norm() / exact.norm())
