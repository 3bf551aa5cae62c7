"""The tests marked `gpu` that compile FlexAttention or a layer, or open a process group."""

from bench.device.gpu_tests import COMPILING, run_tests


def run(quick: bool) -> None:
    """Those."""
    run_tests(COMPILING)
