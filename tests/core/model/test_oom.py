"""Where memory runs out, a pass begins again with fewer tokens at once, and gives the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_work import run_out_alone
from ranks import on_ranks
from support import branching_rollouts, readable_rollouts, rollouts_of, small_config, write_shard

from critic_train.errors import MachineError
from critic_train.events import Notice, RunEnded
from critic_train.model import oom
from critic_train.model.compute import Compute, Keeping
from critic_train.model.critic import Critic
from critic_train.model.memory import checkpoint_activations
from critic_train.model.microbatches import predict_values
from critic_train.model.oom import activation_bytes, is_out_of_memory
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


@pytest.fixture
def short_of_memory(monkeypatch):
    """A device that runs out in the backward pass of anything above some tokens: by then gradients are half there."""

    def limit(tokens, error=None):
        calls = []
        whole = Critic.hidden

        def hidden(self, batch):
            states = whole(self, batch)
            calls.append(batch.computed_tokens)
            if batch.computed_tokens > tokens:
                fault = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                if not states.requires_grad:
                    raise fault
                layer = self.trunk.layers[0].input_layernorm.weight

                def fail(_):
                    raise fault

                handle = layer.register_hook(lambda gradient: (handle.remove(), fail(gradient)))
            return states

        monkeypatch.setattr(Critic, "hidden", hidden)
        return calls

    return limit


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError("Unable to allocate 3 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_where_memory_runs_out_the_mini_batch_goes_on_in_halves_with_the_same_gradient(short_of_memory, error):
    rollouts = branching_rollouts()
    critic = critic_of()
    expected, whole = gradient_of(critic, compute_of(), rollouts)
    calls = short_of_memory(100, error)
    compute = compute_of()
    found, result = gradient_of(critic, compute, rollouts)
    assert difference(found, expected) <= 1e-6
    assert result.value_loss == pytest.approx(whole.value_loss, rel=1e-6)
    assert calls[0] > 100
    assert max(calls[-2:]) <= 100
    # Half of what the mini-batch holds, and again until it fits: not half of the ten thousand asked for.
    tokens = len(rollouts.input_ids)
    assert compute.max_tokens in (tokens // 2, tokens // 4, tokens // 8)
    assert f"from now on {compute.max_tokens:,}" in compute.lowered()
    assert compute.lowered() == ""


def test_predictions_go_on_in_halves_too(short_of_memory):
    rollouts = branching_rollouts()
    critic = critic_of()
    expected = predict_values(critic, rollouts, compute_of(), forest=True)
    short_of_memory(100)
    compute = compute_of()
    found = predict_values(critic, rollouts, compute, forest=True)
    assert np.abs(found - expected).max() <= 1e-5
    assert compute.max_tokens < 10_000


def test_a_single_rollout_that_is_too_much_is_named_with_an_estimate(short_of_memory):
    rollouts = branching_rollouts()
    critic = critic_of()
    short_of_memory(5)
    longest = int(rollouts.lengths.max())
    with pytest.raises(
        MachineError, match=f"a single rollout of {longest} tokens: weights, gradients and moments take"
    ):
        gradient_of(critic, compute_of(), rollouts)


def test_any_other_error_is_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(torch.OutOfMemoryError())


def test_a_run_says_once_that_it_goes_on_with_less(short_of_memory, tmp_path):
    rollouts = readable_rollouts(16)
    shard = write_shard(tmp_path / "data" / "a.parquet", rollouts)
    small = {"preset": "tiny", "max_steps": 4, "batch_size": 32, "device": "cpu", "no_report": True}
    settings = FitSettings(data=[str(shard)], out=str(tmp_path / "out"), **small)
    short_of_memory(150)
    events = list(fit(settings, StopRequest()))
    told = [event.message for event in events if isinstance(event, Notice) and "memory ran out" in event.message]
    assert len(told) == 1
    assert isinstance(events[-1], RunEnded)
    assert events[-1].result["steps"] == 4


def test_a_compute_can_be_copied_with_other_values():
    assert replace(compute_of(), max_tokens=7).lowered() == ""


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_single_process_whose_weights_are_sharded_begins_again(kind):
    ((far, max_tokens),) = on_ranks(1, run_out_alone, kind)
    assert far <= 1e-5
    assert max_tokens == max(35, int(branching_rollouts().lengths.max()))


def test_where_a_single_rollout_is_too_much_less_is_kept_before_it_is_refused(monkeypatch):
    rollouts = branching_rollouts()
    alone = rollouts.take(np.asarray([int(rollouts.lengths.argmax())]))
    critic, tried = critic_of(), []
    expected, _ = gradient_of(critic, compute_of(), alone)
    hidden = Critic.hidden

    def until_tiles(self, batch):
        states = hidden(self, batch)
        tried.append(self.trunk.layers[0].gradient_checkpointing)
        if "forward" not in vars(self.trunk.layers[0].mlp):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states

    monkeypatch.setattr(Critic, "hidden", until_tiles)
    less = (Keeping("layer"), Keeping("layer-tiles"))
    compute = replace(compute_of(), keep_less=less)
    found, _ = gradient_of(critic, compute, alone)
    assert difference(found, expected) <= 1e-6
    assert tried == [False, True, True]
    assert (compute.keeping, compute.keep_less, compute.max_tokens) == (less[1], (), 10_000)
    assert "from now on --activation-checkpointing layer-tiles" in compute.lowered()
    assert compute.lowered() == ""


def test_the_refusal_names_what_would_do(monkeypatch):
    rollouts = branching_rollouts()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    critic, longest = critic_of(), int(rollouts.lengths.max())
    monkeypatch.setattr(Critic, "hidden", fail)
    # Room for a quarter of the activations beside weights, gradients and moments.
    static = 16 * sum(p.numel() for p in critic.parameters())
    held = activation_bytes(critic.trunk, longest, compute_of())
    monkeypatch.setattr(oom, "_device_bytes", lambda compute: static + held // 4)
    with pytest.raises(MachineError, match=f"a single rollout of {longest} tokens") as caught:
        gradient_of(critic, compute_of(), rollouts)
    for way in ("--activation-checkpointing layer-tiles", "4 ranks with --sequence-parallel 4", "--max-length"):
        assert way in caught.value.hint


@pytest.mark.parametrize("kind", ["none", "tiles"])
def test_the_bytes_expected_are_about_those_held(kind):
    """Of a layer that is wide enough for its sizes to count; the embeddings and the last layer beside."""
    config = small_config("Llama", hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_key_value_heads=4)
    critic = build_critic(config, seed=0).train()
    choose_packing(critic, branching_rollouts(), "auto")
    checkpoint_activations(critic, kind)
    tokens = 400
    rollout = rollouts_of([np.random.default_rng(0).integers(1, 100, tokens).astype(np.int32)], [4])
    owned, storages = {p.untyped_storage().data_ptr() for p in critic.parameters()}, {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradient_of(critic, compute_of(), rollout)
    held = sum(storage.nbytes() for address, storage in storages.items() if address not in owned)
    expected = activation_bytes(critic.trunk, tokens, replace(compute_of(), keeping=Keeping(kind)))
    assert held == pytest.approx(expected, rel=0.15)
