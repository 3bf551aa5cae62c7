"""What a step is made of: the kernels that take longest, how long the device idles, and where the host waits for it."""

import collections
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device.telling import tell
from bench.drawing import Shape, draw
from bench.gpu_steps import critic_on_device, shape_config
from bench.steps import fit_step
from critic_train.model.compute import Compute, resolve_device
from critic_train.model.memory import checkpoint_activations


def run(quick: bool) -> None:
    """One step after one that warms up, with layer checkpointing, 8 responses of 4,096 on 4,096."""
    model, half = ("tiny", 256) if quick else ("1.5B", 4096)
    rollouts, device = draw(Shape("", half, half, half), vocabulary=1000), resolve_device("cuda")
    critic = critic_on_device(shape_config(model), device, rollouts)
    checkpoint_activations(critic, "layer")
    compute = Compute(device=device, precision="bf16", max_tokens=12_288 if quick else 20_480, attention="varlen")
    step = fit_step(critic, rollouts, compute)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(f"{Path(warning.filename).stem}:{warning.lineno}" for warning in seen)
    tell(f"the host waits {sum(places.values())} times in a step: {dict(places)}")
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    rows = [row for row in profiled.key_averages() if row.self_device_time_total > 0]
    rows.sort(key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    tell(f"a profiled step takes {seconds:.3f} s, in which kernels run for {busy:.3f} s")
    for row in rows[:16]:
        tell(f"  {row.self_device_time_total / 1e3:8.1f} ms {row.count:6d}x {row.key[:100]}")
