"""A head without a bias: the least squares of numpy, the change that is told, and what is too little to fit to."""

import numpy as np
import pytest
import torch
from small_critics import BIAS, critic_of

from critic_train.errors import DataError
from critic_train.export.bias_refit import StateSums


def states(tokens: int) -> torch.Tensor:
    """Random states with a part that is nearly the same in all, as a trunk's have."""
    draw = np.random.default_rng(0)
    constant = draw.normal(size=64)
    return torch.from_numpy((draw.normal(size=(tokens, 64)) + 3 * constant).astype(np.float32))


def test_the_fit_is_that_of_least_squares():
    critic = critic_of("Llama")
    before = critic.head.weight.detach().clone()
    hidden = states(1000)
    old = (hidden @ before.T)[:, 0] + BIAS
    sums = StateSums(64)
    for part in hidden.split(300):
        sums.add(part)
    told = sums.refit(critic)
    expected, *_ = np.linalg.lstsq(hidden.double().numpy(), old.double().numpy(), rcond=None)
    np.testing.assert_allclose(critic.head.weight.detach().numpy()[0], expected, atol=1e-5)
    assert critic.head.bias.item() == 0.0
    change = (hidden @ critic.head.weight.detach().T)[:, 0] - old
    assert told.largest_change == pytest.approx(float(change.abs().max()), abs=1e-5)
    assert told.mean_square_change == pytest.approx(float(change.square().mean()), abs=1e-6)
    assert (told.bias, told.tokens, told.compared) == (BIAS, 1000, 1000)


def test_states_beyond_the_room_are_summed_and_not_kept():
    hidden, critic, other = states(1000), critic_of("Llama"), critic_of("Llama")
    few, all_of_them = StateSums(64, most_kept_bytes=4 * 64 * 120), StateSums(64)
    for sums in (few, all_of_them):
        for part in hidden.split(100):
            sums.add(part)
    assert few.refit(critic).compared == 120
    all_of_them.refit(other)
    torch.testing.assert_close(critic.head.weight, other.head.weight)


def test_too_few_tokens_are_refused():
    sums = StateSums(64)
    sums.add(states(255))
    with pytest.raises(DataError, match="255 response tokens are too few to fit 64 weights to, 256 are needed"):
        sums.refit(critic_of("Llama"))
