"""What sharing a prompt is worth: eight responses of 1,024 tokens on a prompt of 1,024, Qwen2.5-1.5B's shape."""

from bench.device.speed import tell_step
from bench.drawing import Shape, draw
from bench.gpu_steps import GpuSteps, Way, shape_config
from critic_train.model.compute import resolve_device


def run(quick: bool) -> None:
    """The fit step beside the flat and the padded one, and with the few tokens at once that a CPU has."""
    model, half = ("tiny", 64) if quick else ("1.5B", 1024)
    rollouts = draw(Shape("", half, half, half), vocabulary=1000)
    steps = GpuSteps(shape_config(model), rollouts, resolve_device("cuda"), "varlen", rounds=3)
    tell_step(steps, "fit", Way(max_tokens=16_384))
    tell_step(steps, "flat", Way(max_tokens=16_384))
    tell_step(steps, "fit", Way(max_tokens=4_096))
    tell_step(steps, "padded", Way(max_tokens=8_192))  # of 80 GB, 16,384 take more
