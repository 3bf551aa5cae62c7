"""The second input of a value head: the mean of a rollout's hidden states so far (`--head-inputs last+mean`).

    V_t = w . h_t + u . m_t + b          m_t = (h_1 + ... + h_t) / t

h_1 to h_t are the states in which the response tokens 1 to t of the rollout were chosen, so that the mean looks neither
ahead nor at what other rollouts read. It is linear: u . m_t is the running mean of u . h, so that a forward pass takes
means of one number a token, and never of states. Only the exact head needs the means themselves.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def running_mean(numbers: Tensor, token_index: Tensor) -> Tensor:
    """The mean of each rollout's numbers up to each of them, itself included.

    Args:
        numbers: float [M], of response tokens, rollouts end to end.
        token_index: int64 [M], each token's index among the response tokens of its rollout, from 0.

    Returns:
        float32 [M]. Summed in float64, so that what stands before a rollout leaves no rounding in it.
    """
    numbers = numbers.double()
    sums = numbers.cumsum(0)
    first = torch.arange(len(numbers), device=numbers.device) - token_index
    return ((sums - (sums - numbers)[first]) / (token_index + 1)).float()


def states_and_means(states: Tensor, value_index: Tensor, token_index: Tensor, rows: int) -> Iterator[Tensor]:
    """(h_t, m_t) of response tokens, float64 [at most `rows`, 2 * hidden_size] at a time, in their order.

    Args:
        states: [R, hidden_size].
        value_index: int64 [M], the state of each token.
        token_index: int64 [M], as in `running_mean`.
        rows: tokens at a time.
    """
    before = states.new_zeros(states.shape[1], dtype=torch.float64)  # sum over the rollout that the last part ends in
    for start in range(0, len(value_index), rows):
        index = token_index[start : start + rows]
        own = states[value_index[start : start + rows]].double()
        sums = own.cumsum(0)
        first = torch.arange(len(own), device=own.device) - index
        preceding = torch.where((first < 0)[:, None], -before, (sums - own)[first.clamp(min=0)])
        sums = sums - preceding
        before = sums[-1]
        yield torch.cat([own, sums / (index + 1)[:, None]], dim=1)
