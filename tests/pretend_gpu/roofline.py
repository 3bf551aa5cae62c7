"""A roofline of a step of `fit`: the bytes and FLOP of every operator that torch dispatches, on the pretended GPU.

    ENV/pretend-gpu python tests/pretend_gpu/roofline.py --kind layer --max-tokens 40960

An operator takes as long as its bytes at BANDWIDTH or its FLOP at the rate assumed for its kind, whichever is longer,
and LAUNCH beside. The rates are assumptions; the bytes and FLOP are counted.
"""

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "patched"))
import sitecustomize  # noqa: F401 - comparisons of values pass
import torch
from bench.drawing import Shape, draw
from bench.gpu_steps import MODELS, computed, critic_on_device, flop, shape_config
from bench.steps import fit_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from critic_train.model.compute import Compute, resolve_device
from critic_train.model.memory import checkpoint_activations
from critic_train.model.microbatches import forest_micro_batches

BANDWIDTH, LAUNCH = 2.7e12, 2.5e-6
"""Bytes a second of an H100's memory as copies reach it; seconds between two small kernels."""
MATRIX, MATRIX_FP32, ATTENTION, ATTENTION_BACKWARD = 650e12, 50e12, 370e12, 300e12
"""FLOP a second: bf16 products of this size, float32 ones, FlashAttention-2's two passes on a Hopper chip."""
PEAK = 989e12
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "alias", "detach"),
    *("permute", "as_strided", "split", "unbind", "reshape", "_reshape_alias", "split_with_sizes", "unflatten"),
    *("narrow", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "is_pinned"),
    *("_pin_memory", "resize_", "set_", "record_stream", "_local_scalar_dense", "item"),
}
PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "baddbmm"),
    "attention": ("_varlen_attn", "_varlen_attn_backward", "_flash_attention_forward", "_flash_attention_backward"),
    "gathering keys and values": ("index_select", "index_add_", "index_add", "index", "index_put_"),
    "casts and copies": ("_to_copy", "copy_", "clone", "cat", "contiguous"),
    "optimizer and clip": ("_fused_adamw_", "_foreach_norm", "_foreach_mul_", "_foreach_clamp_max_"),
}


class Counting(TorchDispatchMode):
    """Counts what goes through it.

    Args:
        pairs: of positions that are seen, of one micro-batch.
        width: heads * head_dim.
    """

    def __init__(self, pairs: float, width: int) -> None:
        super().__init__()
        self.pairs, self.width = pairs, width
        self.rows: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])

    @classmethod
    def is_infra_mode(cls) -> bool:
        """So that checkpoints let it be."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and count."""
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        inputs, outputs = _on_device((args, kwargs)), _on_device(result)
        if name in VIEWS or not (inputs or outputs):
            return result
        size, operations, rate = self._cost(name, inputs, outputs)
        seconds = max(size / BANDWIDTH, operations / rate) + LAUNCH
        row = self.rows[name]
        for at, number in enumerate((seconds, 1, size, operations)):
            row[at] += number
        return result

    def _cost(self, name: str, inputs: list[Any], outputs: list[Any]) -> tuple[float, float, float]:
        """(bytes, FLOP, FLOP a second)."""
        size = _bytes(inputs, outputs, in_place=name.endswith("_"))
        if name in PARTS["matrix products"]:
            left, right = [tensor for tensor in inputs if tensor.dim() >= 2][-2:]
            return size, 2.0 * left.numel() * right.shape[-1], MATRIX if left.dtype != torch.float32 else MATRIX_FP32
        if name in ("_varlen_attn", "_flash_attention_forward"):
            return size, self.pairs * 4 * self.width, ATTENTION
        if name in ("_varlen_attn_backward", "_flash_attention_backward"):
            return size, self.pairs * 10 * self.width, ATTENTION_BACKWARD
        if name in ("index", "index_select", "embedding"):
            size = 2 * sum(map(_size, outputs))
        elif name in ("index_add_", "index_put_", "_index_put_impl_"):
            size = 3 * max(map(_size, inputs[1:]), default=0)
        elif name == "_fused_adamw_":
            size = sum(map(_size, inputs)) * 7 / 4
        return size, 0.0, 1.0


def _on_device(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


def _size(tensor: torch.Tensor) -> int:
    """Bytes; what is expanded is read once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def _bytes(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], *, in_place: bool) -> float:
    seen: set[tuple[int, int]] = set()
    total = 0
    for tensor in [*inputs, *outputs]:
        key = (tensor.data_ptr(), _size(tensor))
        if key not in seen or in_place:
            total += key[1]
        seen.add(key)
    return total


def main() -> None:
    """Count one step, and print the estimate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="1.5B")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=40_960)
    parser.add_argument("--kind", choices=["none", "selective", "layer"], default="layer")
    parser.add_argument("--top", type=int, default=24)
    asked = parser.parse_args()
    config, device, half = shape_config(asked.model), resolve_device("cuda"), asked.length // 2
    rollouts = draw(Shape("", half, half, half), vocabulary=1000)
    critic = critic_on_device(config, device, rollouts)
    compute = Compute(device=device, precision="bf16", max_tokens=asked.max_tokens, attention="varlen")
    checkpoint_activations(critic, asked.kind)
    step = fit_step(critic, rollouts, compute)
    step()
    positions, pairs = computed("fit", rollouts, compute.max_tokens)
    batches = len(forest_micro_batches(rollouts, compute.max_tokens))
    with Counting(pairs / batches, config.hidden_size) as counting:
        step()
    useful = flop(config, positions, pairs)
    total = sum(row[0] for row in counting.rows.values())
    shares: dict[str, float] = collections.defaultdict(float)
    for name, row in counting.rows.items():
        shares[next((part for part, names in PARTS.items() if name in names), "elementwise and other")] += row[0]
    print(
        f"{asked.kind}, {compute.max_tokens:,} at once, {batches} micro-batches, {positions:,} positions: useful "
        f"{useful / 1e12:.0f} TFLOP; estimated {total:.3f} s, MFU {useful / total / PEAK:.1%}, "
        f"{len(rollouts.input_ids) / total:,.0f} rollout tokens/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )
    for part, seconds in sorted(shares.items(), key=lambda each: -each[1]):
        print(f"  {seconds * 1e3:8.1f} ms {seconds / total:6.1%}  {part}")
    for name, row in sorted(counting.rows.items(), key=lambda each: -each[1][0])[: asked.top]:
        seconds, count, size, operations = row
        print(f"    {seconds * 1e3:8.1f} ms {count:6.0f}x {size / 1e9:8.1f} GB {operations / 1e12:8.2f} TFLOP  {name}")


if __name__ == "__main__":
    main()
