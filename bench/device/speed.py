"""TFLOP/s and MFU of a step: Qwen2.5-1.5B's shape, eight responses of 8,192 tokens on one prompt of half of that."""

import torch

from bench.device.telling import tell
from bench.drawing import Shape, draw
from bench.gpu_steps import GpuSteps, Way, critic_on_device, shape_config
from critic_train.model.automatic import set_memory
from critic_train.model.compute import Compute, resolve_device
from critic_train.rollouts import Rollouts
from critic_train.settings import TrainComputeSettings

WAYS = [Way(activations="layer", max_tokens=40_960), Way(activations="selective", max_tokens=40_960)]
COMPILED = [Way(max_tokens=20_480, compiled=True), Way(activations="layer", max_tokens=40_960, compiled=True)]
PADDED = Way(max_tokens=8_192)


def run(quick: bool) -> None:
    """What `fit` chooses, other ways, the same compiled, and what it is compared with."""
    model, half = ("tiny", 256) if quick else ("1.5B", 4096)
    rollouts = draw(Shape("", half, half, half), vocabulary=1000)
    config = shape_config(model)
    device = resolve_device("cuda")
    steps = GpuSteps(config, rollouts, device, "varlen", rounds=2)
    steps.critic = critic_on_device(config, device, rollouts)
    chosen = chosen_way(steps, rollouts)
    for way in [chosen, *(way for way in WAYS if way != chosen)]:
        tell_step(steps, "fit", way)
    tell_step(steps, "flat", WAYS[0])
    for way in COMPILED:
        tell_step(steps, "fit", way)
    tell_step(steps, "padded", PADDED)


def chosen_way(steps: GpuSteps, rollouts: Rollouts) -> Way:
    """What `fit` chooses for these rollouts."""
    assert steps.critic is not None
    compute = Compute(device=steps.device, precision="bf16", max_tokens=1, attention=steps.attention)
    kind, choices = set_memory(steps.critic, compute, TrainComputeSettings(), "adamw", rollouts, forest=True)
    tell("chosen: " + "; ".join(choice.sentence() for choice in choices))
    return Way(activations=kind, max_tokens=compute.max_tokens)


def tell_step(steps: GpuSteps, name: str, way: Way) -> None:
    """Measure a step, and tell; one that fails is told of."""
    try:
        row = steps.measured(name, way)
    except Exception as error:
        tell(f"{name} {way}: FAILED {type(error).__name__}: {str(error)[:200]}")
        torch.cuda.empty_cache()
        return
    share = "" if row["MFU"] is None else f", MFU {row['MFU']:.1%}"
    tell(
        f"{row['step']}, activations {row['activations']}: {row['seconds']:.3f} s, {row['rollout tok/s']:,.0f} rollout "
        f"tokens/s, {row['TFLOP/s']:.0f} TFLOP/s{share}, peak {row['peak GB']:.1f} of {row['reserved GB']:.1f} GB held",
        **row,
    )
