"""Layer inputs that wait in host memory: the same gradient, in buffers that are used again."""

import gc

import pytest
import torch
from support import branching_rollouts, small_config

from critic_train.errors import ConfigError, MachineError
from critic_train.model import host_memory, memory
from critic_train.model.compute import Compute
from critic_train.model.selfcheck import choose_packing
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.train_step import LossRecipe, accumulate_gradient
from critic_train.weights.loading import build_critic

RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
LAYERS = 3


def gradient_of(critic, max_tokens=10_000):
    critic.zero_grad(set_to_none=True)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=max_tokens)
    accumulate_gradient(critic, branching_rollouts(), RECIPE, compute, forest=True, stop=StopRequest())
    return torch.cat([p.grad.flatten() for p in critic.parameters()]).double()


@pytest.mark.parametrize("kind", ["layer", "layer-tiles"])
def test_inputs_of_layers_wait_on_the_host_with_the_same_gradient(kind, monkeypatch):
    critic = build_critic(small_config("Llama", num_hidden_layers=LAYERS), seed=0).train()
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    choose_packing(critic, branching_rollouts(), "auto")
    memory.checkpoint_activations(critic, kind)
    expected = gradient_of(critic)
    sent, buffers = [], []
    send, buffer = host_memory.HostActivations._send, host_memory.HostActivations._buffer

    def noted(self, tensor):
        waiting = send(self, tensor)
        assert torch.equal(waiting.copy, tensor)
        sent.append(tensor.shape)
        return waiting

    def counted(self, size):
        found = buffer(self, size)
        buffers.append(found.data_ptr())
        return found

    monkeypatch.setattr(host_memory.HostActivations, "_send", noted)
    monkeypatch.setattr(host_memory.HostActivations, "_buffer", counted)
    memory.checkpoint_activations(critic, kind, on_host=True)
    for _ in range(3):
        assert torch.equal(gradient_of(critic), expected)
        gc.collect()
    # The last layer computes what is read only, and is not computed again.
    assert len(sent) == 3 * (LAYERS - 1)
    assert {shape[-1] for shape in sent} == {64}
    assert len(set(buffers)) == LAYERS - 1
    # Micro-batches of other sizes.
    assert float((gradient_of(critic, 90) - expected).norm() / expected.norm()) <= 1e-6
    memory.checkpoint_activations(critic, "none")
    sent.clear()
    gradient_of(critic)
    assert not sent


def test_the_copy_on_the_host_is_what_comes_back():
    host = host_memory.HostActivations(torch.device("cpu"))
    layers = [torch.nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(4)]
    states = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)

    def through(around):
        out = states
        for layer in layers:
            out = around(lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False), layer, out)
        return out

    expected = torch.autograd.grad(through(lambda checkpoint, f, x: checkpoint(f, x)).sum(), states)[0]
    out = through(host.around)
    assert torch.equal(torch.autograd.grad(out.sum(), states)[0], expected)
    del out
    gc.collect()
    assert len(host._free) == 4


def test_an_empty_tensor_that_a_checkpoint_keeps_stays_where_it_is(monkeypatch):
    """As torch 2.11's does, for which the operating system has no memory of 0 bytes."""
    host, sizes = host_memory.HostActivations(torch.device("cpu")), []
    buffer = host._buffer
    monkeypatch.setattr(host, "_buffer", lambda size: sizes.append(size) or buffer(size))
    x, empty = torch.ones(3, requires_grad=True), torch.ones(0, requires_grad=True)
    out = host.around(lambda f, *args: f(*args), lambda x, empty: (x * x).sum() + (empty * empty).sum(), x, empty)
    out.backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    assert set(sizes) == {12}


def test_what_keeps_no_layer_inputs_has_none_to_move():
    with pytest.raises(ConfigError, match="--offload activations moves the layer inputs"):
        FitSettings(data=["none"], offload="optimizer+activations", activation_checkpointing="tiles")
    FitSettings(data=["none"], offload="all+activations", activation_checkpointing="layer-tiles")
    FitSettings(data=["none"], offload="activations", optimizer="adamw-8bit")
    with pytest.raises(ConfigError, match="adamw-8bit cannot be combined with --offload optimizer"):
        FitSettings(data=["none"], offload="optimizer+activations", optimizer="adamw-8bit")


class Cudart:
    """Stands in for CUDA's runtime: remembers which memory is locked; locks no more than `room` bytes."""

    def __init__(self, room=2**40):
        self.locked, self.room = {}, room

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        if sum(self.locked.values()) + size > self.room:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        return 0 if self.locked.pop(address) else 1

    def cudaGetErrorString(self, status):  # noqa: N802
        return "out of memory"


def test_locked_memory_is_no_more_than_the_moments_and_is_given_back(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    tensors = [host_memory.page_locked_zeros(shape, "moments", "lower it") for shape in ((300, 1000), (7,), ())]
    assert [tuple(t.shape) for t in tensors] == [(300, 1000), (7,), ()]
    # Exact sizes, on pages of their own: torch's pinned memory would round 1,200,000 up to 2,097,152 bytes.
    assert sorted(cudart.locked.values()) == [4, 28, 1_200_000]
    assert all(address % 4096 == 0 for address in cudart.locked)
    tensors[0] += 1
    view = tensors[0][5]
    del tensors
    gc.collect()
    assert list(cudart.locked.values()) == [1_200_000]
    assert view.sum() == 1000
    del view
    gc.collect()
    assert cudart.locked == {}


def test_memory_that_cannot_be_locked_is_not_blamed_on_the_token_budget(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(room=1000))
    with pytest.raises(
        MachineError, match="cannot be page-locked for the optimizer's moments: out of memory"
    ) as caught:
        host_memory.page_locked_zeros((300,), "the optimizer's moments", "do without")
    assert "--max-tokens" not in caught.value.hint
