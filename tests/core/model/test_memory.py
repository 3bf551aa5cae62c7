"""Less memory, the same gradient."""

import platform
import subprocess
import sys

import pytest
import torch
from support import branching_rollouts, readable_rollouts, small_config, write_shard
from torch._dynamo.utils import counters

from critic_train.errors import ConfigError, ModelError
from critic_train.model.compute import Compute
from critic_train.model.memory import checkpoint_activations, compile_layers, give_back_freed_memory, keep_freed_memory
from critic_train.model.selfcheck import choose_packing
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.train_step import LossRecipe, accumulate_gradient
from critic_train.weights.loading import build_critic

RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)


def compute_of(max_tokens=10_000):
    return Compute(device=torch.device("cpu"), precision="fp32", max_tokens=max_tokens)


def critic_of(family="Llama"):
    critic = build_critic(small_config(family), seed=0).train()
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    choose_packing(critic, branching_rollouts(), "auto")
    return critic


def gradient_of(critic, compute, rollouts):
    critic.zero_grad(set_to_none=True)
    result = accumulate_gradient(critic, rollouts, RECIPE, compute, forest=True, stop=StopRequest())
    return torch.cat([p.grad.flatten() for p in critic.parameters()]).double(), result


def difference(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ["layer", "selective"])
def test_activations_are_computed_again_and_the_gradient_is_the_same(kind):
    rollouts = branching_rollouts()
    critic = critic_of()
    expected, _ = gradient_of(critic, compute_of(), rollouts)
    runs = []
    handle = critic.trunk.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    gradient_of(critic, compute_of(), rollouts)
    before = len(runs)
    checkpoint_activations(critic, kind)
    found, _ = gradient_of(critic, compute_of(), rollouts)
    handle.remove()
    assert (before, len(runs)) == (1, 3)
    assert difference(found, expected) <= 1e-6


def test_less_is_kept_the_less_the_stronger():
    kept = {}
    for kind in ("none", "selective", "layer"):
        critic = critic_of()
        checkpoint_activations(critic, kind)
        sizes = []

        def measured(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(measured, lambda tensor: tensor):
            gradient_of(critic, compute_of(), branching_rollouts())
        kept[kind] = sum(sizes)
    assert kept["layer"] < kept["none"]


def test_an_architecture_without_checkpointing_is_told(monkeypatch):
    critic = critic_of()

    def refuse(*_):
        raise ValueError("not compatible")

    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        monkeypatch.setattr(type(critic.trunk), name, refuse, raising=False)
    with pytest.raises(ModelError, match="llama has no activation checkpointing"):
        checkpoint_activations(critic, "layer")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "layer"])
def test_compiled_layers_give_the_same_gradient(kind):
    rollouts = branching_rollouts()
    torch._dynamo.reset()
    counters.clear()
    critic = critic_of()
    expected, _ = gradient_of(critic, compute_of(), rollouts)
    checkpoint_activations(critic, kind)
    compile_layers(critic)
    for max_tokens in (10_000, 90):
        found, _ = gradient_of(critic, compute_of(max_tokens), rollouts)
        assert difference(found, expected) <= 1e-5
    assert counters["stats"]["unique_graphs"] > 0


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ConfigError, match="--compile does not go with --activation-checkpointing selective"):
        FitSettings(data=["none"], compile=True, activation_checkpointing="selective")


def test_checkpointing_is_a_setting_of_a_run(tmp_path):
    shard = write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(8))
    results = []
    for kind in ("none", "layer"):
        settings = FitSettings(
            data=[str(shard)],
            out=str(tmp_path / kind),
            preset="tiny",
            max_steps=2,
            device="cpu",
            activation_checkpointing=kind,
            no_report=True,
        )
        *_, last = fit(settings, StopRequest())
        results.append(last.result["training"]["value_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


FAULTS = """
import resource, sys
import torch
from critic_train.model.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for number in range(20):
    tensors = [torch.zeros(2**20) for _ in range(10)]
    if number == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_tensors_of_the_next_micro_batch_take_the_memory_of_those_before():
    def faults(what: str) -> int:
        ended = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
        return int(ended.stdout)

    if not (given_back := faults("give back")):
        pytest.skip("the kernel has counted no page faults")
    assert faults("keep") < 0.05 * given_back


HOLES = """
import os, sys
import torch
from critic_train.model.memory import give_back_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "give back":
    assert give_back_freed_memory()
torch.ones(2**22)  # once it is freed, glibc takes allocations of its 16 MiB from the heap
before = resident()
tensors = [torch.ones(2**21) for _ in range(20)]
kept = tensors[-1]
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_given_back_leaves_no_holes_between_tensors_in_use():
    """One of 20 tensors of 8 MiB stays."""

    def held(what: str) -> int:
        ended = subprocess.run([sys.executable, "-c", HOLES, what], capture_output=True, text=True, check=True)
        return int(ended.stdout)

    assert held("as it is") > 19 * 2**23
    assert held("give back") < 1.5 * 2**23


def test_an_allocator_that_the_user_has_set_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not keep_freed_memory()
    assert not give_back_freed_memory()
