"""The chunked cross-entropy against torch's own on all logits: value and gradients, in any number of chunks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from critic_train.model import next_token_head
from critic_train.model.next_token_head import NextTokenHead

STATES, HIDDEN, TOKENS = 23, 12, 60


def case() -> tuple[NextTokenHead, torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Head, states, index, ids and weights: several tokens follow one state, some alike, and one state has none."""
    draw = np.random.default_rng(0)
    ids = np.sort(draw.choice(1000, 17, replace=False)).astype(np.int64)
    head = NextTokenHead(ids, HIDDEN).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(17, HIDDEN, generator=generator))
    states = torch.randn(STATES, HIDDEN, generator=generator, requires_grad=True)
    index = draw.integers(0, STATES - 1, TOKENS)
    chosen = draw.choice(ids, TOKENS).astype(np.int32)
    return head, states, index, chosen, torch.rand(TOKENS, generator=generator).numpy()


@pytest.mark.parametrize("logits_at_once", [1, 17 * 4, 17 * 5 + 3, 2**20])
def test_loss_and_gradients_are_those_of_all_logits(logits_at_once, monkeypatch):
    monkeypatch.setitem(next_token_head.LOGITS_AT_ONCE, "cpu", logits_at_once)
    head, states, index, chosen, weights = case()
    loss = head(states, index, head.labels(chosen), weights)
    (0.3 * loss).backward()

    doubled = states.detach().double().requires_grad_(True)
    weight = head.weight.detach().double().requires_grad_(True)
    position = {int(each): row for row, each in enumerate(head.ids)}
    labels = torch.tensor([position[int(each)] for each in chosen])
    logits = (doubled @ weight.T)[index]
    expected = (F.cross_entropy(logits, labels, reduction="none") * torch.from_numpy(weights).double()).sum()
    (0.3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(states.grad.double(), doubled.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_all_logits_are_never_made(monkeypatch):
    monkeypatch.setitem(next_token_head.LOGITS_AT_ONCE, "cpu", 17 * 2)
    head, states, index, chosen, weights = case()
    made = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == 17:
                made.append(len(result))
            return result

    with Shapes():
        head(states, index, head.labels(chosen), weights)
    assert made
    assert max(length for length in made if length != HIDDEN) <= 2


def test_a_rank_without_tokens_adds_nothing():
    head, states, _, _, _ = case()
    nothing = np.zeros(0, dtype=np.int64)
    loss = head(states[:0], nothing, nothing, np.zeros(0, dtype=np.float32))
    loss.backward()
    assert loss.item() == 0.0
    assert not head.weight.grad.any()


def test_under_autocast_products_are_bf16_and_the_softmax_is_not():
    head, states, index, chosen, weights = case()
    exact = head(states, index, head.labels(chosen), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(states, index, head.labels(chosen), weights)
    rounded.backward()
    assert rounded.dtype == states.grad.dtype == head.weight.grad.dtype == torch.float32
    assert 0.0 < abs((rounded - exact).item()) < 0.02 * exact.item()
