"""Ragged random rollouts: gaps in the mask, scattered prompt groups, ties, returns that vary along a rollout."""

from collections.abc import Callable

import numpy as np
import pytest

from critic_train.evaluation import resampling
from critic_train.rollouts import Rollouts

World = tuple[Rollouts, dict[str, np.ndarray]]


def make_world(seed: int, *, rollouts: int = 40, groups: int = 9, offset: float = 0.0, flat: bool = False) -> World:
    """Rollouts and the values of two critics, "a" and "b".

    Args:
        seed: of everything drawn.
        rollouts: their number.
        groups: number of prompt groups, scattered over the rollouts.
        offset: added to returns and values.
        flat: one return a rollout (gamma = lambda = 1), else a walk along the rollout.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, rollouts)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = int(offsets[-1])
    mask = rng.random(tokens) < 0.7
    mask[offsets[:-1]] = False
    mask[offsets[1:] - 1] = True  # every rollout has a response token
    group = rng.integers(0, groups, rollouts) * 7 - 11
    level = (np.round(2 * rng.normal(0, 1, 200)[group + 11]) + rng.integers(0, 3, rollouts)) / 4
    returns = np.repeat(level, lengths)
    if not flat:
        returns = returns + np.round(rng.normal(0, 0.4, tokens), 1)
    critics = {
        "a": np.round(0.6 * returns + rng.normal(0.1, 0.5, tokens), 1) + offset,
        "b": rng.normal(0, 1, tokens) + offset,
    }
    world = Rollouts(
        input_ids=np.zeros(tokens, dtype=np.int32),
        offsets=offsets,
        response_mask=mask,
        returns=(returns + offset).astype(np.float32),
        values=(0.5 * returns + rng.normal(0, 0.4, tokens) + offset).astype(np.float32),
        group=group.astype(np.int64),
        row=rng.permutation(rollouts).astype(np.int64),
        labels={
            "task": np.array(["sum", "word", "chat"])[rng.integers(0, 3, rollouts)],
            "cut": rng.random(rollouts) < 0.3,
            "turns": rng.integers(1, 12, rollouts),
        },
    )
    return world, {name: v.astype(np.float32) for name, v in critics.items()}


@pytest.fixture
def bootstrap(monkeypatch):
    """Intervals by the bootstrap however few groups there are, to compare them with a resampling by hand."""
    monkeypatch.setattr(resampling, "FEW_GROUPS", 2)


@pytest.fixture(scope="session")
def world() -> Callable[..., World]:
    """`make_world`."""
    return make_world
