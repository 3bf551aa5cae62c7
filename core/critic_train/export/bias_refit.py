"""A value head without a bias in place of one that has it, for systems that load none.

The new weight w + d changes the values of some rollouts least: d minimises sum (h d - b)^2 over the states h of their
response tokens, where b is the bias. Final norms leave no constant in a state, so the fit is not exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from critic_train.errors import DataError
from critic_train.model.critic import Critic

RIDGE = 1e-9
"""Of the mean square of the states: it decides only along directions that no state has."""
TOKENS_PER_WEIGHT = 4
"""With fewer response tokens than so many for each weight, the fit is of the noise of those few."""


class StateSums:
    """Sums over states, from which the fit is made, and the states themselves for as long as they need little room.

    Args:
        hidden_size: of a state.
        most_kept_bytes: states beyond are summed but not kept; the largest change is then of those kept.
    """

    def __init__(self, hidden_size: int, most_kept_bytes: int = 2**30) -> None:
        self._gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self._sum = torch.zeros(hidden_size, dtype=torch.float64)
        self._states: list[Tensor] = []
        self._room = most_kept_bytes // (4 * hidden_size)
        self.tokens = 0

    def add(self, states: Tensor) -> None:
        """Take in the states of some response tokens, [M, hidden_size]."""
        exact = states.double().cpu()
        self._gram += exact.T @ exact
        self._sum += exact.sum(0)
        self.tokens += len(exact)
        rows = min(len(states), self._room)
        self._room -= rows
        self._states.append(states[:rows].float().cpu())

    def refit(self, critic: Critic) -> "Refit":
        """Replace the critic's head by one without a bias.

        Raises:
            DataError: there are too few response tokens.
        """
        size = len(self._sum)
        if self.tokens < TOKENS_PER_WEIGHT * size:
            raise DataError(
                f"--bias refit: {self.tokens:,} response tokens are too few to fit {size:,} weights to, "
                f"{TOKENS_PER_WEIGHT * size:,} are needed",
                hint="give more --data",
            )
        bias = critic.head.bias.item()
        ridge = RIDGE * float(self._gram.diagonal().mean())
        change = torch.linalg.solve(self._gram + ridge * torch.eye(size, dtype=torch.float64), bias * self._sum)
        with torch.no_grad():
            critic.head.weight += change.to(critic.head.weight)
            critic.head.bias.zero_()
        errors = torch.cat([states.double() @ change for states in self._states]) - bias
        return Refit(
            bias=bias,
            tokens=self.tokens,
            compared=len(errors),
            largest_change=float(errors.abs().max()),
            mean_square_change=float(errors.square().mean()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """What a refit changed.

    Attributes:
        bias: the one that is gone.
        tokens: response tokens that it was fitted to.
        compared: those of them of which the changes are.
        largest_change: of a value.
        mean_square_change: of the values.
    """

    bias: float
    tokens: int
    compared: int
    largest_change: float
    mean_square_change: float
