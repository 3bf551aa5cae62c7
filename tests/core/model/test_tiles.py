"""Parts that treat each position alone, found by what they do, and computed in tiles with the same gradient."""

import weakref

import pytest
import torch
from support import branching_rollouts, small_config
from torch import nn

from critic_train.model import tiles
from critic_train.model.compute import Compute
from critic_train.model.memory import checkpoint_activations
from critic_train.model.selfcheck import choose_packing
from critic_train.stopping import StopRequest
from critic_train.training.train_step import LossRecipe, accumulate_gradient
from critic_train.weights.loading import build_critic
from critic_train.weights.lora import add_adapters

RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """As long as the test model's hidden state: several in a micro-batch of branching_rollouts."""
    monkeypatch.setattr(tiles, "SMALLEST_TILE", 16)


def critic_of(family="Llama", adapted=False, packing="auto", **changes):
    critic = build_critic(small_config(family, **changes), seed=0).train()
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    if adapted:
        add_adapters(critic, rank=4, alpha=8, seed=0)
    choice = choose_packing(critic, branching_rollouts(), packing)
    return critic, choice.forest


def gradient_of(critic, forest, precision="fp32"):
    critic.zero_grad(set_to_none=True)
    compute = Compute(device=torch.device("cpu"), precision=precision, max_tokens=10_000)
    result = accumulate_gradient(critic, branching_rollouts(), RECIPE, compute, forest=forest, stop=StopRequest())
    gradient = {name: p.grad.double().clone() for name, p in critic.named_parameters() if p.grad is not None}
    return gradient, result


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-9)) for name in one)


# Dense; mixtures of experts; recurrent layers; norms of heads; norms after each part; rows in place of a forest.
@pytest.mark.parametrize(
    ("family", "packing"),
    [
        *((name, "auto") for name in ("Llama", "Qwen3Moe", "Qwen3Next", "GraniteMoeHybrid", "Gemma3Text", "Bloom")),
        ("Qwen3Moe", "rows"),  # its router views the rows as one
    ],
)
def test_tiles_give_the_same_values_and_gradients(family, packing):
    critic, forest = critic_of(family, packing=packing)
    expected, before = gradient_of(critic, forest)
    names = tiles.compute_in_tiles(critic)
    assert any("mlp" in name or "moe" in name for name in names)
    found, after = gradient_of(critic, forest)
    assert difference(found, expected) <= 1e-5
    assert after.value_loss == pytest.approx(before.value_loss, rel=1e-6)
    tiles.compute_at_once(critic.trunk)
    again, _ = gradient_of(critic, forest)
    assert difference(again, expected) == 0


def test_adapters_are_trained_in_tiles():
    pytest.importorskip("peft")
    critic, forest = critic_of(adapted=True)
    expected, _ = gradient_of(critic, forest)
    # Norms whose weights are frozen keep nothing beside their input.
    assert set(tiles.compute_in_tiles(critic)) == {"layers.0.mlp", "layers.1.mlp"}
    assert difference(gradient_of(critic, forest)[0], expected) <= 1e-5


def test_a_tile_is_as_long_as_a_state_is_wide_and_is_computed_again_alone():
    critic, forest = critic_of()
    seen = []
    tiles.compute_in_tiles(critic)
    critic.trunk.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    _, result = gradient_of(critic, forest)
    forward, backward = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert (max(forward), len(forward)) == (64, -(-result.computed_tokens // 64))
    assert sum(forward) == result.computed_tokens
    assert backward == forward[::-1]


def test_what_is_held_is_the_input():
    held = {}
    for tiled in (False, True):
        critic, forest = critic_of()
        if tiled:
            tiles.compute_in_tiles(critic)
        owned = {p.untyped_storage().data_ptr() for p in critic.parameters()}
        storages = {}

        def note(tensor, storages=storages, owned=owned):
            if tensor.untyped_storage().data_ptr() not in owned:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            gradient_of(critic, forest)
        held[tiled] = sum(storage.nbytes() for storage in storages.values())
    assert held[True] <= 0.6 * held[False]


def test_a_checkpoint_around_tiles_drops_their_input():
    critic, forest = critic_of()
    checkpoint_activations(critic, "layer-tiles")
    norm, inputs, alive = critic.trunk.layers[0].post_attention_layernorm, [], []
    norm.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    critic.trunk.norm.register_forward_pre_hook(lambda module, args: alive.append(inputs[0]()))
    gradient_of(critic, forest)
    assert alive == [None]


class Pooling(nn.Module):
    """Adds a thousandth of the mean over all positions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, states):
        return torch.tanh(states * self.weight) ** 2 + 1e-3 * states.mean(1, keepdim=True)


class Counting(Pooling):
    """Treats positions alone, and counts them in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, states):
        self.calls += 1
        return torch.tanh(states * self.weight) ** 2


class Shifted(Pooling):
    """Reads the position before."""

    def forward(self, states):
        return torch.tanh(states.roll(1, dims=1) * self.weight) ** 2


class Scaled(Pooling):
    """Treats positions alone, and is linear: it keeps nothing but its input."""

    def forward(self, states):
        return states * self.weight


class Alone(Pooling):
    """Treats positions alone."""

    def forward(self, states):
        return torch.tanh(states * self.weight) ** 2


@pytest.mark.parametrize(
    ("module", "expected"), [(Pooling, False), (Counting, False), (Shifted, False), (Scaled, False), (Alone, True)]
)
def test_only_what_treats_positions_alone_and_keeps_more_than_its_input_is_cut(module, expected):
    critic, _ = critic_of()
    critic.trunk.layers[0].mlp = module()
    assert ("layers.0.mlp" in tiles.compute_in_tiles(critic)) == expected


def test_bf16_gives_the_gradient_of_bf16():
    critic, forest = critic_of()
    exact, _ = gradient_of(critic, forest)
    rounded, _ = gradient_of(critic, forest, "bf16")
    tiles.compute_in_tiles(critic)
    found, _ = gradient_of(critic, forest, "bf16")
    assert difference(found, exact) <= 1.5 * difference(rounded, exact)
