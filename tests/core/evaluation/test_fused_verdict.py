"""The fused baseline as `eval` judges it: figures, intervals, and that it is no worse than what it is made of."""

from dataclasses import replace

import numpy as np
import pytest

from critic_train.data.mixture import Residuals, fused_baseline, fused_weights
from critic_train.data.returns import gae
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.judge import Judge
from critic_train.rollouts import Rollouts


def with_rewards(rollouts, rng):
    rewards = np.where(rollouts.response_mask, rng.normal(size=len(rollouts.returns)), 0.0).astype(np.float32)
    return replace(rollouts, rewards=rewards)


def made_by_hand(rollouts, values, gamma):
    """The fused values of every token, with what is fused taken from the tokens one rollout after another."""
    mask = rollouts.response_mask
    rows = []
    for a, b in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        v, g = (x[a:b][mask[a:b]].astype(float) for x in (values, rollouts.returns))
        rewards = np.append(np.zeros(len(g) - 1), g[-1])
        if rollouts.rewards is not None:
            rewards = rollouts.rewards[a:b][mask[a:b]].astype(float)
        to_come = np.zeros(len(v))
        for t in reversed(range(len(v))):
            to_come[t] = rewards[t] + (gamma * to_come[t + 1] if t + 1 < len(v) else 0.0)
        d, y = v - v[0], to_come - v[0]
        rows.append((v[0], rewards.sum() - v[0], y.mean(), d.mean(), (d**2).mean(), (d * y).mean()))
    residuals = Residuals(**dict(zip(Residuals.__slots__, np.array(rows).T, strict=True)))
    keys, group = np.unique(rollouts.group, return_inverse=True)
    weights = fused_weights(residuals, group, len(keys))
    assert weights is not None
    line = fused_baseline(residuals, group, weights)
    offset, scale = (np.repeat(x, rollouts.lengths) for x in (line.offset, line.scale))
    return offset + scale * values, line


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize(
    ("rewards", "recipe"),
    [(False, {}), (True, {}), (True, {"gamma": 0.9}), (True, {"lam": 0.8}), (False, {"lam": 0.8})],
)
def test_its_figures_are_those_of_its_values(world, parts, rewards, recipe):
    rollouts, values = world(11, rollouts=60, groups=12)
    if rewards:
        rollouts = with_rewards(rollouts, np.random.default_rng(1))
    advantage = AdvantageRecipe(**recipe)
    judge = Judge(["a"], advantage=advantage, resamples=20)
    for index in np.array_split(np.arange(len(rollouts)), parts):
        tokens = np.isin(np.repeat(np.arange(len(rollouts)), rollouts.lengths), index)
        judge.add(rollouts.take(index), {"a": values["a"][tokens]})
    verdict = judge.verdict()
    fused, line = made_by_hand(rollouts, values["a"], advantage.gamma)
    found, mask = verdict["baselines"]["fused"], rollouts.response_mask
    v, g = fused[mask], rollouts.returns[mask].astype(float)
    assert found["of"] == "a"
    assert found["mse"] == pytest.approx(((v - g) ** 2).mean(), abs=1e-6)
    assert found["explained_variance"] == pytest.approx(1 - np.var(g - v) / np.var(g), abs=1e-6)
    assert found["mae"] == pytest.approx(np.abs(v - g).mean(), abs=1e-6)
    assert found["pearson"] == pytest.approx(np.corrcoef(v, g)[0, 1], abs=1e-6)
    assert (found["prompt_weight"], found["response_weight"]) == (
        pytest.approx(line.prompt_weight.mean(), abs=1e-6),
        pytest.approx(line.response_weight.mean(), abs=1e-6),
    )
    given = rollouts.rewards
    if given is None:
        given = np.zeros_like(rollouts.returns)
        last = [np.flatnonzero(mask[:stop])[-1] for stop in rollouts.offsets[1:]]
        given[last] = rollouts.returns[last]
    expected, _ = gae(given, fused, mask, rollouts.offsets, gamma=advantage.gamma, lam=advantage.lam)
    assert found["advantage_variance"] == pytest.approx(np.var(expected[mask]), abs=1e-5)
    alone, fused_part = verdict["critics"]["a"], verdict["critics"]["a"]["fused"]
    assert "by_position" not in fused_part
    versus = found["explained_variance_minus"]["critic"]["difference"]
    assert versus == pytest.approx(found["explained_variance"] - alone["explained_variance"])
    reduced = found["variance_reduction_minus"]["critic"]["difference"]
    assert reduced == pytest.approx(found["variance_reduction"] - alone["variance_reduction"])


def test_every_critic_has_its_own(world):
    rollouts, values = world(12, rollouts=60, groups=12)
    judge = Judge(["a", "b"], resamples=20)
    judge.add(rollouts, values)
    verdict = judge.verdict()
    assert [verdict["critics"][name]["fused"]["of"] for name in "ab"] == ["a", "b"]
    assert verdict["baselines"]["fused"]["mse"] == verdict["critics"]["a"]["fused"]["mse"]
    assert verdict["critics"]["a"]["fused"]["mse"] != verdict["critics"]["b"]["fused"]["mse"]


def drawn(kind, rng, groups=80, peers=6, tokens=5):
    """A world of two-valued outcomes, and a critic of some kind."""
    chance = np.repeat(rng.beta(0.8, 1.0, groups), peers)
    outcome = (rng.random(groups * peers) < chance).astype(float)
    share = np.arange(1, tokens + 1) / tokens
    prior = {"right": chance, "blind": np.full(len(chance), 0.4), "stale": 0.5 * chance + 0.3}[kind.split()[0]]
    noise = 0.4 * rng.normal(size=(groups, 1)).repeat(peers, axis=0) if "stale" in kind else 0.0
    values = np.repeat(prior[:, None], tokens, axis=1) + 0.3 * noise
    if "watches" in kind:
        values = values + (outcome - chance)[:, None] * share * 0.8
    if "noisy" in kind:
        values = values + rng.normal(0, 0.4, values.shape) * (share > share[0])
    rollouts = Rollouts(
        input_ids=np.zeros(len(chance) * (tokens + 1), dtype=np.int32),
        offsets=np.arange(len(chance) + 1, dtype=np.int64) * (tokens + 1),
        response_mask=np.tile(np.arange(tokens + 1) > 0, len(chance)),
        returns=np.repeat(outcome, tokens + 1).astype(np.float32),
        values=None,
        group=np.repeat(np.arange(groups), peers),
        row=np.arange(len(chance)),
    )
    return rollouts, np.insert(values, 0, 0.0, axis=1).ravel().astype(np.float32)


KINDS = [
    "right",
    "right watches",
    "right noisy",
    "blind",
    "blind noisy",
    "blind watches",
    "stale",
    "stale watches noisy",
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_never_clearly_worse_than_the_better_of_both(kind):
    rollouts, values = drawn(kind, np.random.default_rng(3), groups=150)
    judge = Judge(["c"], resamples=200)
    judge.add(rollouts, {"c": values})
    for other, versus in judge.verdict()["baselines"]["fused"]["explained_variance_minus"].items():
        assert versus["interval"][1] >= 0.0, (other, versus)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_its_intervals_cover_the_truth_and_it_is_never_worse(kind):
    """200 worlds of 80 prompts, against one of 10,000."""
    rng = np.random.default_rng(9)

    def judged(groups):
        rollouts, values = drawn(kind, rng, groups)
        judge = Judge(["c"], resamples=10)
        judge.add(rollouts, {"c": values})
        return judge.verdict()["baselines"]["fused"]

    figures = ("explained_variance", "variance_reduction")
    large = judged(10_000)
    truth, worse, bounds = np.array([large[name] for name in figures]), np.zeros(2), []
    for _ in range(200):
        fused = judged(80)
        bounds.append([fused[f"{name}_interval"] for name in figures])
        differences = fused["explained_variance_minus"]
        worse += [differences[name]["interval"][1] < 0 for name in ("critic", "group_mean")]
    low, high = np.moveaxis(np.array(bounds), 2, 0)
    covered = ((low <= truth) & (truth <= high)).mean(axis=0)
    # 90 %, less what 200 draws may be off by.
    assert (covered >= 0.90 - 2 * np.sqrt(0.09 / 200)).all(), covered
    # Of intervals of 95 % for two equals, one in 40 lies below 0.
    assert (worse <= 10).all(), worse
