"""The loss against verl's, and against formulas written out by hand.

The reference numbers were printed by verl 0.9.1 (`pip install --no-deps verl==0.9.1`, CPU, torch 2.13.0):

    from verl.trainer.ppo.core_algos import compute_value_loss
    loss, clipfrac = compute_value_loss(V, G, V_OLD, MASK, eps, mode, loss_scale_factor=7 or None)
    print(repr(loss.item()), repr(clipfrac.item()))

with the float64 tensors below: masks with gaps, and a rollout that is masked out whole.
"""

import numpy as np
import pytest
import torch

from critic_train.training.loss import share_of_tokens, token_weights, value_loss

V = [
    [0.3, -1.2, 2.5, 0.1, 0.9, -0.4],
    [1.1, 0.2, -0.7, 0.6, 0.0, 0.5],
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
    [-0.9, 0.8, 0.35, -2.2, 1.7, 0.05],
]
V_OLD = [
    [0.1, -0.3, 1.2, 0.0, 1.9, -0.4],
    [0.4, 0.3, -0.1, -0.6, 0.2, 1.4],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [-0.2, 0.9, -0.35, -1.1, 0.9, 0.0],
]
G = [
    [1.0, -2.0, 0.5, 0.0, 0.25, -1.0],
    [1.0, 1.0, -1.5, 0.75, -0.25, 0.0],
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    [0.5, 0.5, 1.5, -1.0, 0.0, 0.1],
]
MASK = [[1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]

VERL = {
    ("token-mean", 0.5): 0.5003846153846153,
    ("token-mean", 0.2): 0.6492307692307691,
    ("token-sum", 0.5): 6.504999999999999,
    ("token-sum", 0.2): 8.439999999999998,
    ("seq-mean-token-sum", 0.5): 2.168333333333333,
    ("seq-mean-token-sum", 0.2): 2.813333333333333,
    ("seq-mean-token-mean", 0.5): 0.44954861010575803,
    ("seq-mean-token-mean", 0.2): 0.6174652763095775,
    ("seq-mean-token-sum-norm", 0.5): 0.30976190476190474,
    ("seq-mean-token-sum-norm", 0.2): 0.4019047619047619,
}
VERL_CLIPFRAC = 0.3846153843195266  # eps = 0.5, in every mode


def masked(table: list[list[float]]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float64)[torch.tensor(MASK, dtype=torch.bool)]


def loss_of(mode: str, eps: float | None):
    counts = np.asarray(MASK).sum(axis=1)
    weights = token_weights(counts, mode, 7.0 if mode.endswith("norm") else None)
    per_token = torch.from_numpy(np.repeat(weights, counts))
    return value_loss(masked(V).requires_grad_(), masked(G), masked(V_OLD), per_token, eps)


@pytest.mark.parametrize(("mode", "eps"), list(VERL))
def test_the_loss_is_verls(mode, eps):
    assert loss_of(mode, eps).loss.item() == pytest.approx(VERL[mode, eps], abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("mode", sorted({mode for mode, _ in VERL}))
def test_clipfrac_is_verls(mode):
    clipped = loss_of(mode, 0.5).clipped.item()
    assert share_of_tokens(clipped, int(np.sum(MASK))) == pytest.approx(VERL_CLIPFRAC, abs=1e-12)


def test_without_a_clip_it_is_half_the_mean_squared_error():
    plain = sum((v - g) ** 2 for v, g in zip(masked(V).tolist(), masked(G).tolist(), strict=True)) / 13 / 2
    for result in (loss_of("token-mean", None), loss_of("token-mean", 1e9)):
        assert result.loss.item() == pytest.approx(plain, rel=1e-12)
        assert result.clipped.item() == result.saturated.item() == 0


def test_a_saturated_token_is_one_whose_gradient_the_clip_has_zeroed():
    values = masked(V).requires_grad_()
    weights = torch.ones(13, dtype=torch.float64)
    result = value_loss(values, masked(G), masked(V_OLD), weights, 0.5)
    result.loss.backward()
    assert result.saturated.item() == int((values.grad == 0).sum()) > 0


@pytest.mark.parametrize("mode", sorted({mode for mode, _ in VERL}))
def test_a_mini_batch_without_response_tokens_weighs_nothing(mode):
    assert token_weights(np.zeros(3, dtype=np.int64), mode, 2.0).tolist() == [0.0, 0.0, 0.0]
