"""GAE against a loop written out here, and against verl's own function."""

import ast
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import lines_executed

from critic_train.data.returns import gae, monte_carlo

GAMMAS = (1.0, 0.99, 0.5, 0.0)
LAMBDAS = (1.0, 0.95, 0.3, 0.0)

# verl 0.9.1 (`pip install --no-deps verl==0.9.1`): the function `verls_gae` below reads out of the package, called as
#     compute_gae_advantage_return(REWARDS, VALUES, MASK, 0.9, 0.8)[1] * MASK   (float64 tensors)
REWARDS = [[0.0, 0.25, 0.0, -0.5, 1.0], [0.5, 0.0, 2.0, 0.0, 0.0]]
VALUES = [[0.5, 0.25, 7.0, -1.0, 0.125], [1.0, -8.0, 0.75, 0.0, 3.0]]
MASK = [[1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0]]
VERLS_RETURNS = [[0.221112, 0.2446, 0.0, 0.2425, 1.0], [2.075, 0.0, 2.0, 0.0, 0.0]]


def one_by_one(rewards, values, mask, gamma, lam, bootstrap):
    """Schulman et al. 2016, equations 11 to 16, token by token from the end, for one rollout."""
    advantages, returns = np.zeros(len(mask)), np.zeros(len(mask))
    next_value, next_advantage = bootstrap, 0.0
    for t in reversed(range(len(mask))):
        if not mask[t]:
            continue
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[t]
        advantages[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages, returns


def random_batch(seed, lengths):
    """Ragged columns with gaps in the masks; what stands off the mask is NaN."""
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    mask = draw.random(total) < draw.choice([0.2, 0.7, 1.0])
    rewards, values = draw.normal(size=(2, total))
    rewards[~mask] = values[~mask] = np.nan
    return rewards, values, mask, offsets


def rows(offsets):
    return [slice(start, stop) for start, stop in itertools.pairwise(offsets.tolist())]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_textbook_loop(gamma, lam, seed):
    draw = np.random.default_rng(100 + seed)
    lengths = draw.integers(1, 70, 40)
    rewards, values, mask, offsets = random_batch(seed, lengths)
    # Some end there (terminal: nothing follows), others were cut.
    bootstrap = np.where(draw.random(40) < 0.5, 0.0, draw.normal(size=40))
    advantages, returns = gae(rewards, values, mask, offsets, gamma=gamma, lam=lam, bootstrap=bootstrap)
    summed = monte_carlo(rewards, mask, offsets, gamma=gamma, bootstrap=bootstrap)
    for i, row in enumerate(rows(offsets)):
        args = rewards[row], values[row], mask[row], gamma
        expected = one_by_one(*args, lam, bootstrap[i])
        np.testing.assert_allclose(advantages[row], expected[0], atol=1e-10, rtol=0)
        np.testing.assert_allclose(returns[row], expected[1], atol=1e-10, rtol=0)
        np.testing.assert_allclose(summed[row], one_by_one(*args, 1.0, bootstrap[i])[1], atol=1e-10, rtol=0)


def test_a_lambda_a_rollout():
    draw = np.random.default_rng(0)
    rewards, values, mask, offsets = random_batch(9, draw.integers(1, 50, 30))
    lam = draw.random(30)
    advantages, _ = gae(rewards, values, mask, offsets, gamma=0.9, lam=lam)
    for i, row in enumerate(rows(offsets)):
        expected, _ = one_by_one(rewards[row], values[row], mask[row], 0.9, lam[i], 0.0)
        np.testing.assert_allclose(advantages[row], expected, atol=1e-10, rtol=0)


def test_a_long_rollout_is_summed_without_drift():
    """A million tokens at gamma = lambda = 1: the sum of the rewards, to rounding."""
    draw = np.random.default_rng(0)
    rewards, values = draw.normal(size=(2, 10**6)).astype(np.float32)
    mask = np.ones(10**6, dtype=bool)
    _, returns = gae(rewards, values, mask, np.asarray([0, 10**6]), gamma=1.0, lam=1.0)
    exact = np.cumsum(rewards[::-1].astype(np.longdouble))[::-1].astype(np.float64)
    np.testing.assert_allclose(returns, exact, atol=1e-9, rtol=0)


def test_a_rollout_alone_has_the_same_figures_to_the_bit():
    rewards, values, mask, offsets = random_batch(3, np.asarray([5, 60, 1, 17, 300]))
    together = gae(rewards, values, mask, offsets, gamma=0.97, lam=0.9)
    for row in rows(offsets):
        alone = np.asarray([0, row.stop - row.start])
        figures = gae(rewards[row], values[row], mask[row], alone, gamma=0.97, lam=0.9)
        assert figures[0].tobytes() == together[0][row].tobytes()
        assert figures[1].tobytes() == together[1][row].tobytes()


@pytest.mark.parametrize("mask", [[], [False, False, False]])
def test_nothing_to_do(mask):
    n = len(mask)
    advantages, returns = gae(np.zeros(n), np.zeros(n), np.asarray(mask, bool), np.asarray([0, n]), gamma=1, lam=1)
    assert advantages.tolist() == returns.tolist() == [0.0] * n


@pytest.mark.parametrize("rollouts", [1, 1000, 100_000])
def test_a_million_tokens_take_no_loop_over_tokens_or_rollouts(rollouts):
    rewards, values = np.random.default_rng(0).normal(size=(2, 10**6)).astype(np.float32)
    offsets = np.linspace(0, 10**6, rollouts + 1).astype(np.int64)
    mask = np.ones(10**6, dtype=bool)
    assert lines_executed(lambda: gae(rewards, values, mask, offsets, gamma=0.99, lam=0.95)) < 1000


def verls_gae():
    """verl's compute_gae_advantage_return, compiled from the installed package: importing it needs ray and more."""
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("verl is not installed")
    package = Path(found.submodule_search_locations[0])
    helpers = functions_of(
        package / "utils" / "torch_functional.py", ["masked_sum", "masked_mean", "masked_var", "masked_whiten"]
    )
    algorithms = package / "trainer" / "ppo" / "core_algos.py"
    return functions_of(algorithms, ["compute_gae_advantage_return"], verl_F=SimpleNamespace(**helpers))[
        "compute_gae_advantage_return"
    ]


def functions_of(path, names, **known):
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in tree.body:
        node.decorator_list = []
    space = {"torch": torch, **known}
    exec(compile(tree, str(path), "exec"), space)
    return {name: space[name] for name in names}


@pytest.mark.parametrize(("gamma", "lam"), list(itertools.product(GAMMAS, LAMBDAS)))
def test_it_is_verls(gamma, lam):
    verl = verls_gae()
    draw = np.random.default_rng(7)
    rewards, values = draw.normal(size=(2, 12, 40))
    mask = draw.random((12, 40)) < 0.6
    mask[:, :2] = True
    tensors = (torch.from_numpy(a) for a in (rewards, values, mask.astype(np.float64)))
    whitened, expected = verl(*tensors, gamma, lam)
    flat = (rewards.ravel(), values.ravel(), mask.ravel(), np.arange(13) * 40)
    advantages, returns = gae(*flat, gamma=gamma, lam=lam)
    np.testing.assert_allclose(returns[flat[2]], expected.numpy()[mask], atol=1e-10, rtol=0)
    ours = advantages[flat[2]]
    white = (ours - ours.mean()) / np.sqrt(ours.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(white, whitened.numpy()[mask], atol=1e-8, rtol=0)


def test_it_is_what_verl_printed():
    flat = [np.asarray(column, dtype=np.float64).ravel() for column in (REWARDS, VALUES, MASK)]
    _, returns = gae(flat[0], flat[1], flat[2] > 0, np.asarray([0, 5, 10]), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(returns, np.ravel(VERLS_RETURNS), atol=1e-12, rtol=0)
