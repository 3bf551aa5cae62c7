"""Layers that are compiled where a run is long, and it computes the same in less time."""

from types import SimpleNamespace

import pytest
import torch
from support import branching_rollouts, small_config

from critic_train.model import compiling
from critic_train.model.compute import Compute, Keeping
from critic_train.model.memory import set_keeping
from critic_train.model.selfcheck import choose_packing
from critic_train.settings import TrainComputeSettings
from critic_train.weights.loading import build_critic

TOKENS = 100 * len(branching_rollouts().input_ids)
"""Of a run of a hundred passes over the prompt."""


def prepared(kind="none"):
    critic = build_critic(small_config("Llama"), seed=0).train()
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    forest = choose_packing(critic, branching_rollouts(), "auto").forest
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
    compute.keep_less = (Keeping("layer"),)
    set_keeping(critic, compute, Keeping(kind))
    return critic, compute, forest


def chosen(critic, compute, forest, monkeypatch, *, seconds, compile_layers=lambda critic: None):
    """The choice where passes take these seconds, as they are and compiled; they are made all the same."""
    times, clock = iter(seconds), compiling._Passes.seconds

    def timed(passes):
        clock(passes)
        return next(times)

    monkeypatch.setattr(compiling._Passes, "seconds", timed)
    monkeypatch.setattr(compiling, "compile_layers", compile_layers)
    return compiling.choose_compiled(critic, compute, branching_rollouts(), forest=forest, tokens=TOKENS)


@pytest.mark.parametrize(
    ("seconds", "value", "reason"),
    [
        ((17.9,), False, "passes of 1,790 s in all are too few to pay for it"),
        ((20, 15), True, "the largest prompt takes 15 s compiled and 20 s as it is; the run about 33 min as it is"),
        ((20, 19.5), False, "the largest prompt takes 19.5 s compiled and 20 s as it is"),
    ],
)
def test_a_long_run_takes_what_is_faster(seconds, value, reason, monkeypatch):
    critic, compute, forest = prepared()
    choice = chosen(critic, compute, forest, monkeypatch, seconds=seconds)
    assert (choice.name, choice.value) == ("compile", value)
    assert choice.reason.startswith(reason)
    assert compute.keep_less == (() if value else (Keeping("layer"),))
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize(("compiled", "kind"), [(15, "layer"), (25, "selective")])
def test_a_compiled_layer_keeps_its_input_where_half_was_kept(compiled, kind, monkeypatch):
    critic, compute, forest = prepared("selective")
    chosen(critic, compute, forest, monkeypatch, seconds=(20, compiled))
    assert compute.keeping == Keeping(kind)


def test_tiles_are_not_compiled(monkeypatch):
    critic, compute, forest = prepared("layer-tiles")
    choice = chosen(critic, compute, forest, monkeypatch, seconds=())
    assert (choice.value, compute.keeping.kind) == (False, "layer-tiles")


def fails(critic):
    raise RuntimeError("no compiler is found\nand more")


def compute_other_states(critic):
    torch.nn.init.ones_(critic.trunk.layers[1].self_attn.v_proj.weight)


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor):
        return tensor.clone()

    @staticmethod
    def backward(context, slope):
        return slope / 2


def compute_another_gradient(critic):
    critic.trunk.layers[1].register_forward_hook(lambda module, args, output: _HalfGradient.apply(output))


@pytest.mark.parametrize(
    ("compile_layers", "reason"),
    [
        (fails, "compiled layers fail on cpu: no compiler is found"),
        (compute_other_states, "compiled layers compute other states"),
        (compute_another_gradient, "compiled layers compute another gradient"),
    ],
)
def test_what_fails_or_computes_something_else_is_not_used(compile_layers, reason, monkeypatch):
    critic, compute, forest = prepared()
    choice = chosen(critic, compute, forest, monkeypatch, seconds=(20, 1), compile_layers=compile_layers)
    assert (choice.value, choice.reason) == (False, reason)


@pytest.mark.parametrize(
    ("changes", "train", "device", "ranks", "expected"),
    [
        ({}, None, "cuda", 1, True),
        ({}, "full", "cuda", 1, True),
        ({}, "lora", "cuda", 1, False),
        ({}, "last-1", "cuda", 1, False),
        ({"compile": True}, None, "cuda", 1, False),
        ({"no_compile": True}, None, "cuda", 1, False),
        ({}, None, "cpu", 1, False),
        ({}, None, "cuda", 2, False),
    ],
)
def test_it_chooses_itself_on_one_gpu_where_all_is_trained(changes, train, device, ranks, expected):
    compute = SimpleNamespace(device=torch.device(device), ranks=SimpleNamespace(sharded=ranks > 1))
    assert compiling.chooses_to_compile(TrainComputeSettings(**changes), compute, train) == expected
