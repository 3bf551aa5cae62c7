"""Estimates of memory beside the peaks that torch's allocator saw, on the pretended GPU.

    ENV/pretend-gpu python tests/pretend_gpu/memory_table.py --model 1.5B --length 8192

For each kind of activation checkpointing, and for what a run chooses by itself: the tokens at once, the estimate for
its largest micro-batch, and the peak of a step. Two prompts with eight responses each, half of a sequence each or
as --prompt says; random weights, which are made on the device. The self-check's own peak comes first.
"""

import argparse
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "patched"))
import numpy as np
import sitecustomize  # noqa: F401 - comparisons of values pass
import torch
from bench.drawing import Shape, draw
from bench.gpu_steps import MODELS, shape_config

from critic_train.data.scanning import SAMPLED_ROLLOUTS
from critic_train.errors import MachineError
from critic_train.layers.prefix_tree import build_tree_layout
from critic_train.model import automatic
from critic_train.model.compute import Compute, resolve_device
from critic_train.model.critic import Critic
from critic_train.model.memory import checkpoint_activations
from critic_train.model.memory_use import MemoryUse
from critic_train.model.microbatches import forest_micro_batches
from critic_train.model.selfcheck import select_packing
from critic_train.rollouts import Rollouts
from critic_train.settings import TrainComputeSettings, offloads
from critic_train.stopping import StopRequest
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.weights.loading import build_critic

GIB = 2**30
KINDS = ["auto", "none", "tiles", "selective", "layer", "layer-tiles"]
RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)


def main() -> None:
    """Print a line for each kind of checkpointing; with --json, one object for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="1.5B")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt", type=int, help="its tokens; half of a sequence by default")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    config, device = shape_config(asked.model), resolve_device("cuda")
    prompt = asked.prompt or asked.length // 2
    response = asked.length - prompt
    config.num_hidden_layers = asked.layers or config.num_hidden_layers
    rollouts = draw(Shape("", prompt, response, response, asked.responses, groups=2), vocabulary=1000)
    with torch.device(device):
        critic = build_critic(config, seed=0).train()
    compute = Compute(device=device, precision="bf16", max_tokens=4096)
    offload = automatic.choose_offload(critic, compute, "adamw", torch.cuda.mem_get_info()[1])
    compute.offload = offload.value if offload is not None else "none"
    torch.cuda.reset_peak_memory_stats()
    sample = rollouts.take(np.arange(min(len(rollouts), SAMPLED_ROLLOUTS + 1)))
    packing, _ = select_packing(critic, sample, TrainComputeSettings(), compute)
    checked = torch.cuda.max_memory_allocated() / GIB
    if not asked.json:
        print(
            f"{asked.model}, rollouts of {asked.length:,}: self-check {checked:.2f} GiB, {compute.attention}",
            flush=True,
        )
    assert packing.forest
    chosen = None
    for kind in asked.kinds:
        if kind == chosen:
            continue
        try:
            found = measured(critic, replace(compute), rollouts, kind) | {"self_check": checked}
        except torch.OutOfMemoryError:
            error = "the passes by which memory is measured do not fit"
            print(json.dumps({"asked": kind, "error": error}) if asked.json else f"  {kind:9s} {error}", flush=True)
            release(critic)
            continue
        chosen = found["kind"] if kind == "auto" else chosen
        print(json.dumps(found) if asked.json else shown(found), flush=True)


def measured(critic: Critic, compute: Compute, rollouts: Rollouts, asked: str) -> dict[str, Any]:
    """Choose tokens, and take two steps with them; sizes in GiB. Moments that wait on the host are left out."""
    uses: list[MemoryUse] = []
    originals = automatic.measure_memory, automatic.measure_further

    def noting(measure: Any) -> Any:
        def noted(*args: Any, **named: Any) -> MemoryUse:
            uses.append(measure(*args, **named))
            return uses[-1]

        return noted

    automatic.measure_memory, automatic.measure_further = map(noting, originals)
    checkpoint_activations(critic, "none")
    # Of a kind that is asked for, nothing more waits on the host: pinned memory there is real.
    settings = TrainComputeSettings(
        activation_checkpointing=asked, offload="auto" if asked == "auto" else compute.offload
    )
    group = rollouts.take(np.arange(len(rollouts) // 2))
    kind, _ = automatic.set_memory(critic, compute, settings, "adamw", group, forest=True)
    automatic.measure_memory, automatic.measure_further = originals
    lowered = automatic.try_largest(critic, compute, group, forest=True)
    layouts = [build_tree_layout(rollouts, order) for order in forest_micro_batches(rollouts, compute.max_tokens)]
    trained = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    moments = 0 if offloads(compute.offload, "optimizer") else 8 * trained
    largest, before = max(map(len, layouts)), compute.max_tokens
    found = {
        "asked": asked,
        "kind": kind,
        "offload": compute.offload,
        "max_tokens": before,
        "largest": largest,
        "micro_batches": len(layouts),
        "estimate": (held(uses[-1], largest, 0 if len(layouts) > 1 else 4 * trained) + moments) / GIB,
        "lowered": lowered,
    }
    try:
        steps(critic, compute, rollouts)
    except MachineError as error:
        found["error"] = error.message.splitlines()[0]
    found |= {"peak": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB}
    found["halved"] = compute.max_tokens if compute.max_tokens != before else None
    release(critic)
    return found


def release(critic: Critic) -> None:
    """Give back what a row has left."""
    critic.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


def held(use: MemoryUse, tokens: int, to_come: int) -> float:
    """Bytes of a step beside the moments, by the estimate, which has the gradients there from the beginning.

    Args:
        use: what was measured.
        tokens: of the largest micro-batch.
        to_come: bytes of gradients that are not there yet when its backward pass begins, as in the only micro-batch
            of a step: they come as its activations go.
    """
    return max(use.fixed, use.fixed + use.per_token * tokens - to_come)


def steps(critic: Critic, compute: Compute, rollouts: Rollouts) -> None:
    """Two steps of `fit`; the peak is the second one's."""
    on_host = offloads(compute.offload, "optimizer")
    optimizer = None if on_host else build_optimizer(critic, lr=1e-5, head_lr=1e-4, weight_decay=0.0)
    gc.collect()
    torch.cuda.empty_cache()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        accumulate_gradient(critic, rollouts, RECIPE, compute, forest=True, stop=StopRequest())
        clip_gradient(critic, 1.0)
        if optimizer is not None:
            optimizer.step()
        critic.zero_grad(set_to_none=True)


def shown(found: dict[str, Any]) -> str:
    """A line of the table."""
    line = (
        f"  {found['asked']:9s} -> {found['kind']:9s} offload {found['offload']:9s} {found['max_tokens']:7,} at once, "
        f"largest {found['largest']:7,} of {found['micro_batches']}: "
    )
    if "error" in found:
        return f"{line}does not fit: estimate {found['estimate']:.1f} GiB; {found['error']}"
    return (
        f"{line}estimate {found['estimate']:5.1f}, peak {found['peak']:5.1f} GiB, ratio "
        f"{found['estimate'] / found['peak']:.3f}, reserved {found['reserved']:5.1f}, self-check / peak "
        f"{found['self_check'] / found['peak']:.2f}"
        + (f"; HALVED to {found['halved']:,}" if found["halved"] else "")
        + (f"; {found['lowered']}" if found["lowered"] else "")
    )


if __name__ == "__main__":
    main()
