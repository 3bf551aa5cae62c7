"""What training mode draws at random is found and turned off, whatever it is called."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import branching_rollouts, small_config
from torch import nn

from critic_train.errors import ModelError
from critic_train.model.selfcheck import choose_packing
from critic_train.model_files.randomness import is_dropout, silence
from critic_train.weights.loading import build_critic

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("SeedOss", {"residual_dropout": 0.1, "attention_dropout": 0.1}, ()),
        ("Starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.1}, ()),
        ("BioGpt", {"hidden_dropout_prob": 0.1, "activation_dropout": 0.1, "layerdrop": 0.1}, ()),
        ("Mixtral", {"router_jitter_noise": 0.3, **MOE}, ("MixtralSparseMoeBlock stays in evaluation mode",)),
        (
            "Phimoe",
            {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01, **MOE},
            ("PhimoeSparseMoeBlock stays in evaluation mode", "PhimoeTopKRouter stays in evaluation mode"),
        ),
    ],
)
def test_training_mode_computes_what_evaluation_mode_does(family, changes, told):
    critic = build_critic(small_config(family, **changes), seed=0).train()
    choice = choose_packing(critic, branching_rollouts(), "rows")
    assert choice.silenced == told
    ids = torch.from_numpy(np.arange(3, 60))[None]

    def states():
        with torch.no_grad():
            return critic.trunk(input_ids=ids, use_cache=False).last_hidden_state

    critic.train()  # what is turned off stays so
    first, second = states(), states()
    critic.eval()
    assert torch.equal(first, second)
    assert float((first - states()).abs().max()) <= 1e-5


def test_a_number_of_the_evaluation_that_is_named_like_noise_keeps_its_value():
    """PhiMoE's routers read `router_jitter_noise` as a threshold: at 0 its values are others."""
    config = small_config("Phimoe", router_jitter_noise=0.01, hidden_dropout=0.1, **MOE)
    critic = build_critic(config, seed=0)
    assert critic.trunk.config.router_jitter_noise == 0.01
    assert critic.trunk.config.hidden_dropout == 0.0


def test_names_of_dropouts():
    names = ("resid_pdrop", "attention_dropout", "layerdrop", "hidden_dropout_prob")
    assert all(is_dropout(name, 0.1) for name in names)
    assert not is_dropout("hidden_dropout", 0.0)
    assert not is_dropout("router_jitter_noise", 0.1)
    assert not is_dropout("drop_tokens", True)


class Drawing(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.amount, self.dropout = kind, 0.1, nn.Dropout(0.1)

    def forward(self, states):
        if self.kind == "module":
            return self.dropout(states)
        self.dropout.p = 0.0
        if self.kind == "functional":
            return F.dropout(states, self.amount, self.training)
        return states + torch.randn_like(states) * self.amount  # in evaluation mode, too


class Trunk(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.config = small_config("Llama")
        self.layers = nn.ModuleList([nn.Linear(8, 8), last])

    def forward(self, states):
        for layer in self.layers:
            states = layer(states)
        return states


@pytest.mark.parametrize(
    ("kind", "told"),
    [("module", ["dropout.p is 0"]), ("functional", ["Drawing stays in evaluation mode"]), ("both", [])],
)
def test_a_known_number_is_set_to_0_and_one_of_an_unknown_name_is_not_read(kind, told):
    torch.manual_seed(0)
    trunk = Trunk(Drawing(kind)).train()
    states = torch.randn(1, 5, 8)
    # What draws in evaluation mode as well is no fault of training mode.
    assert silence(trunk, lambda: trunk(states)) == told
    if told:
        trunk.train()
        assert torch.equal(trunk(states), trunk(states))


def test_what_cannot_be_turned_off_is_named():
    class Stubborn(nn.Module):
        def forward(self, states):
            return states + torch.randn_like(states) * trunk.training

    trunk = Trunk(Stubborn()).train()
    states = torch.randn(1, 5, 8)
    with pytest.raises(ModelError, match=r"llama draws at random in training mode, in layers.1 \(Stubborn\)"):
        silence(trunk, lambda: trunk(states))
