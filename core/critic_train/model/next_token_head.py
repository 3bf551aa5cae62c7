"""A linear head that predicts the next token from the states that the value head reads, for a loss beside the value's.

What a rollout returns is one noisy number; what it says is a distribution at every token. A trunk that also learns to
predict the response knows sooner what the value depends on (Yang et al. 2024, arXiv 2406.10216, for reward models).
The head covers only the ids that occur in the responses, and is not part of the critic that is exported.

Shapes: R and M as in `model_input`; K ids.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from critic_train.layers.to_device import to_device

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Logits that exist at the same time, by device: [R, K] of them are never made."""


class NextTokenHead(nn.Module):
    """Scores of the ids that occur, in float32 weights.

    Args:
        ids: int64 [K], ascending: the ids that it can predict.
        hidden_size: of a state.

    Attributes:
        ids: as given.
        weight: float32 [K, hidden_size], on "meta" until it is filled.
    """

    def __init__(self, ids: NDArray[np.int64], hidden_size: int) -> None:
        super().__init__()
        self.ids = ids
        self.weight = nn.Parameter(torch.empty(len(ids), hidden_size, dtype=torch.float32, device="meta"))

    def labels(self, token_ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [M]: the row of each id; all of them are among `ids`."""
        return np.searchsorted(self.ids, token_ids)

    def forward(
        self, states: Tensor, state_index: NDArray[np.int64], labels: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> Tensor:
        """The weighted sum of the tokens' negative log-likelihoods, float32, 0-d; a micro-batch's part of the loss.

        Args:
            states: [R, hidden_size].
            state_index: int64 [M], the state in which each token is chosen.
            labels: int64 [M], from `labels`.
            weights: float32 [M].
        """
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        with torch.autocast(kind, enabled=False):
            loss: Tensor = _LinearCrossEntropy.apply(states, self.weight, state_index, labels, weights, dtype)  # type: ignore[no-untyped-call]
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Matrix product, softmax and cross-entropy, a few states at a time.

    The gradient of a chunk is made when its logits are there, in the forward pass; the backward pass has nothing left
    to do. Logits are thus neither kept nor computed twice. A state that several tokens follow is multiplied once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        state_index: NDArray[np.int64],
        labels: NDArray[np.int64],
        weights: NDArray[np.float32],
        dtype: torch.dtype,
    ) -> Tensor:
        count, vocabulary = len(states), len(weight)
        rows = max(1, LOGITS_AT_ONCE.get(states.device.type, 2**26) // vocabulary)
        order = np.argsort(state_index, kind="stable")
        bounds, device = np.searchsorted(state_index[order], np.arange(0, count + rows, rows)).tolist(), states.device
        index, label, of_token = (to_device(array[order], device) for array in (state_index, labels, weights))
        of_state = of_token.new_zeros(count).index_add_(0, index, of_token)
        cast_states, cast_weight = states.to(dtype), weight.to(dtype)
        loss = of_token.new_zeros(())
        states_gradient = torch.empty_like(states)
        weight_gradient = torch.zeros_like(weight)
        for number, start in enumerate(range(0, count, rows)):
            part, tokens = slice(start, start + rows), slice(bounds[number], bounds[number + 1])
            logits = (cast_states[part] @ cast_weight.T).float()
            normalizers = logits.logsumexp(1)
            at = (index[tokens] - start, label[tokens])
            loss += (of_state[part] * normalizers).sum() - (of_token[tokens] * logits[at]).sum()
            gradient = logits.sub_(normalizers[:, None]).exp_().mul_(of_state[part, None])
            gradient.index_put_(at, -of_token[tokens], accumulate=True)
            gradient = gradient.to(dtype)
            states_gradient[part] = gradient @ cast_weight
            weight_gradient += gradient.T @ cast_states[part]
        ctx.gradients = states_gradient, weight_gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.gradients
        del ctx.gradients
        return states.mul_(scale), weight.mul_(scale), None, None, None, None
