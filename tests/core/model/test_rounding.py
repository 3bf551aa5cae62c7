"""What counts as rounding: what a unit in the last place of every part gives, and no more."""

import pytest
import torch
from torch import nn

from critic_train.model.rounding import Rounding


def deep(seed=0, layers=8):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(layers)])


@pytest.fixture
def states():
    return torch.randn(200, 32, generator=torch.Generator().manual_seed(1))


def test_another_rounding_of_the_same_sums_is_rounding_and_ten_times_as_much_is_not(states):
    model = deep()
    with torch.no_grad():
        rounding = Rounding(model, lambda: model(states))
        assert not rounding.chooses
        assert rounding.explains(rounding.expected)  # measures
        exact = model.double()(states.double())
    assert rounding.explains(exact.float())
    far = rounding.expected + 1e-5 * rounding.scale * torch.randn(states.shape)
    assert not rounding.explains(far)
    assert 1e-8 < rounding.rounding() < 1e-6
    assert not rounding.explains(torch.full_like(far, torch.nan))


def test_a_single_state_that_is_off_is_seen(states):
    model = deep()
    with torch.no_grad():
        rounding = Rounding(model, lambda: model(states))
        off = rounding.expected.clone()
        off[17] += 1e-4
        assert not rounding.explains(off)
        assert rounding.difference(off) == pytest.approx(1e-4 / rounding.scale, rel=1e-2)
        assert rounding.explains(off[:17], torch.arange(17))


class Choosing(nn.Module):
    """Takes one of two layers by a score; where there are ties, rounding decides."""

    def __init__(self, ties):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.ties = nn.Linear(32, 32), nn.Linear(32, 32), ties
        self.score = nn.Identity()

    def forward(self, states):
        one, other = self.first(states), self.second(states)
        scores = [one.sum(-1), torch.where(self.ties, one.sum(-1), other.sum(-1))]
        chosen = self.score(torch.stack(scores, dim=-1)).topk(1).indices
        return torch.where(chosen == 0, one, other)


def test_a_choice_that_rounding_turns_is_no_fault_and_many_of_them_are(states):
    ties = torch.arange(200) == 50
    model = Choosing(ties)
    with torch.no_grad():
        rounding = Rounding(model, lambda: model(states))
        assert rounding.chooses
        turned = rounding.expected.clone()
        turned[50] += 0.5
        assert rounding.explains(turned)
        turned[::8] += 0.5
        assert not rounding.explains(turned)


def test_a_model_is_left_without_hooks(states):
    model = deep()
    with torch.no_grad():
        rounding = Rounding(model, lambda: model(states))
        rounding.explains(rounding.expected)
        assert torch.equal(model(states), rounding.expected)
