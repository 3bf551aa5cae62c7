"""Which kernel is taken, and what a kernel that is wrong, or lacks what a layer asks for, is passed over for."""

import pytest
import torch
from attention_cases import CPU, layout_of, operators_by_hand, varlen_by_hand

from critic_train.errors import ConfigError, MachineError
from critic_train.layers.attention_kernel import AttentionCall, Scoring
from critic_train.layers.cuda_kernels import VarlenKernel
from critic_train.layers.kernel_choice import choose_attention, kernel_error, kernels_to_try

CALL = AttentionCall(heads=4, kv_heads=2, key_size=16, value_size=16)


def test_a_cpu_takes_scaled_dot_product_attention_and_refuses_the_others():
    assert choose_attention("auto", [CALL], layout_of(0), CPU, "fp32") == ("sdpa", [])
    assert choose_attention("auto", [CALL], layout_of(0), CPU, "bf16") == ("sdpa", [])
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
    from critic_train.layers import kernel_choice

    layout = layout_of(0)
    right = lambda queries, device, softcapped: VarlenKernel(queries, device, operators=operators_by_hand())  # noqa: E731
    assert kernel_error(right, CALL, layout, CPU, torch.float32) == ""

    def without_mask(*arguments, window_size, **more):
        return varlen_by_hand(*arguments, window_size=(-1, 10**6), **more)

    wrong = lambda queries, device, softcapped: VarlenKernel(queries, device, operators=operators_by_hand(without_mask))  # noqa: E731
    assert "it is off by" in kernel_error(wrong, CALL, layout, CPU, torch.float32)
    monkeypatch.setattr(kernel_choice, "kernels_to_try", lambda *_: ["flex", "sdpa"])
    chosen, passed = choose_attention("auto", [CALL], layout, CPU, "fp32")
    assert chosen == "sdpa"
    assert "--attention flex is not used: it fails on cpu" in passed[0]
    monkeypatch.setattr(kernel_choice, "kernels_to_try", lambda *_: ["flex"])
    with pytest.raises(MachineError, match="flex is not used"):
        choose_attention("flex", [CALL], layout, CPU, "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_is_tried_on_the_heads_that_the_model_has(dtype):
    tried = []

    def build(queries, device, softcapped):
        def attend(query, key, value, scoring):
            tried.append((query.shape[1], key.shape[1], query.shape[-1], scoring.window, scoring.scale))
            return VarlenKernel(queries, device, operators=operators_by_hand())(query, key, value, scoring)

        return attend

    layout = layout_of(0)
    call = AttentionCall(heads=6, kv_heads=3, key_size=24, value_size=16, scoring=Scoring(window=10**6, scale=0.3))
    assert kernel_error(build, call, layout, CPU, dtype) == ""
    # A window that cuts none of the small rollouts that are tried would not be tried at all.
    assert tried == [(6, 3, 24, int(layout.depth.max()) // 3, 0.3)]


def test_a_kernel_that_lacks_what_a_layer_asks_for_is_passed_over():
    def build(queries, device, softcapped):
        return VarlenKernel(queries, device, operators=operators_by_hand())

    call = AttentionCall(heads=4, kv_heads=2, key_size=16, value_size=16, has_sinks=True)
    assert kernel_error(build, call, layout_of(0), CPU, torch.float32) == "it computes neither soft caps nor sinks"
