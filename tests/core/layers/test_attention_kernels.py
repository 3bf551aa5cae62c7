"""Every way to compute attention on a prefix tree, held against plain attention under the mask written out."""

from typing import get_args

import pytest
import torch
from attention_cases import (
    CPU,
    check,
    layout_of,
    queries_of,
    varlen_by_hand,
)

from critic_train.errors import ConfigError, MachineError
from critic_train.layers.attention import KERNELS, choose_attention, kernel_error, kernels_to_try
from critic_train.layers.cuda_kernels import VarlenKernel
from critic_train.layers.sdpa_kernels import SdpaKernel
from critic_train.settings import Attention

KERNELS_WITH_WINDOWS = {
    "sdpa": lambda queries: SdpaKernel(queries, CPU),
    "varlen": lambda queries: VarlenKernel(queries, CPU, attend=varlen_by_hand),
}


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("name", KERNELS_WITH_WINDOWS)
def test_kernels_are_plain_attention_windows_in_the_rollout_included(name, seed, asking, window):
    layout = layout_of(seed)
    queries, positions = queries_of(layout, seed, asking)
    check(KERNELS_WITH_WINDOWS[name](queries), layout, positions, window)


def test_every_value_of_the_flag_but_auto_names_a_kernel():
    assert set(get_args(Attention)) == {"auto", *KERNELS}


def test_a_cpu_takes_scaled_dot_product_attention_and_refuses_the_others():
    assert choose_attention("auto", layout_of(0), CPU, "fp32") == ("sdpa", [])
    assert choose_attention("auto", layout_of(0), CPU, "bf16") == ("sdpa", [])
    with pytest.raises(ConfigError, match="flex needs a CUDA device"):
        kernels_to_try("flex", CPU, "fp32")
    with pytest.raises(ConfigError, match="varlen needs --precision bf16 and a CUDA device"):
        kernels_to_try("varlen", CPU, "bf16")


def test_cuda_takes_variable_length_attention_in_bf16_and_flex_in_float32(monkeypatch):
    from critic_train.layers import cuda_kernels

    cuda = torch.device("cuda")
    monkeypatch.setattr(cuda_kernels, "varlen_available", lambda device: True)
    assert kernels_to_try("auto", cuda, "bf16") == ["varlen", "flex", "sdpa"]
    assert kernels_to_try("auto", cuda, "fp32") == ["flex", "sdpa"]
    with pytest.raises(ConfigError, match="not fp32"):
        kernels_to_try("varlen", cuda, "fp32")
    monkeypatch.setattr(cuda_kernels, "varlen_available", lambda device: False)
    assert kernels_to_try("auto", cuda, "bf16") == ["flex", "sdpa"]


def test_a_kernel_that_is_wrong_or_fails_is_passed_over(monkeypatch):
    from critic_train.layers import attention

    layout = layout_of(0)
    right = lambda queries: VarlenKernel(queries, CPU, attend=varlen_by_hand)  # noqa: E731
    assert kernel_error(right, layout, CPU, torch.float32) == ""

    def without_mask(*arguments, window_size, **more):
        return varlen_by_hand(*arguments, window_size=(-1, 10**6), **more)

    wrong = lambda queries: VarlenKernel(queries, CPU, attend=without_mask)  # noqa: E731
    assert "differs from scaled-dot-product attention" in kernel_error(wrong, layout, CPU, torch.float32)
    monkeypatch.setattr(attention, "kernels_to_try", lambda *_: ["flex", "sdpa"])
    chosen, passed = choose_attention("auto", layout, CPU, "fp32")
    assert chosen == "sdpa"
    assert "--attention flex is not used: it fails on cpu" in passed[0]
    monkeypatch.setattr(attention, "kernels_to_try", lambda *_: ["flex"])
    with pytest.raises(MachineError, match="flex is not used"):
        choose_attention("flex", layout, CPU, "fp32")
