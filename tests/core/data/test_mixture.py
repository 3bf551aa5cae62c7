"""The fused baseline against its formula, written out over the other prompts one by one."""

import numpy as np
import pytest
from scipy.stats import f_oneway

from critic_train.data.mixture import Residuals, fused_baseline, fused_weights


def drawn(sizes, seed=0, *, movement=0.3, bias=0.0, length=6):
    """Rollouts of some prompts: outcome, values [m, length] and prompt; the critic knows half of the prompt."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    level, inside = rng.normal(size=len(sizes))[group], rng.normal(size=len(group))
    share = np.arange(length) / length
    values = 0.5 * level[:, None] + bias + movement * inside[:, None] * share + 0.2 * rng.normal(size=length) * share
    return level + inside, values, group


def residuals_of(outcome, values):
    """As `Residuals` declares them, for rewards that come at the end."""
    first, moved = values[:, 0], values - values[:, :1]
    target = outcome - first
    return Residuals(
        first_value=first,
        residual=outcome - first,
        target=target,
        movement=moved.mean(axis=1),
        movement_square=(moved**2).mean(axis=1),
        movement_target=(moved * target[:, None]).mean(axis=1),
    )


def fused(outcome, values, group):
    residuals = residuals_of(outcome, values)
    weights = fused_weights(residuals, group, int(group.max()) + 1)
    assert weights is not None
    return fused_baseline(residuals, group, weights)


def covariance_components(x, z, group):
    """Between and within groups, by one-way analysis of variance with n_0 for unequal sizes."""
    keys = np.unique(group)
    sizes = np.array([np.sum(group == k) for k in keys])
    apart = [(x[group == k].mean() - x.mean()) * (z[group == k].mean() - z.mean()) for k in keys]
    between = float(np.dot(sizes, apart))
    within = sum(((x[group == k] - x[group == k].mean()) * (z[group == k] - z[group == k].mean())).sum() for k in keys)
    within /= len(x) - len(keys)
    effective = (len(x) - (sizes**2).sum() / len(x)) / (len(keys) - 1)
    return (between / (len(keys) - 1) - within) / effective, within


def unit_error(group):
    """Squared standard error of a covariance between groups that is 0, where that within is 1."""
    sizes = np.array([np.sum(group == k) for k in np.unique(group)])
    effective = (len(group) - (sizes**2).sum() / len(group)) / (len(sizes) - 1)
    return (1 / (len(sizes) - 1) + 1 / (len(group) - len(sizes))) / effective**2


def by_hand(outcome, values, group):
    """F of every rollout and token, prompt by prompt, rollout by rollout."""
    found = np.empty_like(values)
    for prompt in np.unique(group):
        away = group != prompt
        first, moved = values[away][:, 0], values[away] - values[away][:, :1]
        e = outcome[away] - first
        d, others = moved.mean(axis=1), group[away]
        tau2, s2 = covariance_components(e, e, others)
        tau2 = max(tau2, 0.0)
        c = covariance_components(d, e, others)[0]
        q = (moved**2).mean() - d.mean() ** 2
        p = (moved * e[:, None]).mean() - e.mean() * d.mean()
        mine = np.flatnonzero(group == prompt)
        # kappa is tau^2: the rewards come at the end, so that y is e at every token.
        kappa = covariance_components(e, e, others)[0]

        def weights(k, c=c, q=q, p=p, kappa=kappa, tau2=tau2, s2=s2, e=e, d=d, others=others):
            if k == 0:
                return 0.0, min(max(p / q, 0.0), 1.0)
            _, scale = np.linalg.solve([[tau2 + s2 / k, c], [c, q]], [kappa, p])
            scale = min(max(scale, 0.0), 1.0)
            left = e - scale * d
            cross, size = covariance_components(left, e, others)[1], covariance_components(left, left, others)[1]
            apart = kappa - scale * c
            error = np.sqrt((size * s2 + cross**2) * unit_error(others))
            return min(max(apart / (tau2 + s2 / k), 0.0), 1.0) if abs(apart) > 2.5 * error else 0.0, scale

        w, scale = weights(len(mine) - 1)
        level = np.mean([weights(np.sum(group == g) - 1)[0] for g in group]) * e.mean()
        for i in mine:
            peers = [outcome[j] - values[j, 0] for j in mine if j != i]
            shrunk = w * (np.mean(peers) - e.mean()) if peers else 0.0
            found[i] = values[i, 0] + scale * (values[i] - values[i, 0]) + shrunk + level
    return found


@pytest.mark.parametrize("bias", [0.0, 3.0])
@pytest.mark.parametrize("sizes", [[4] * 9, [1, 2, 3, 8, 5, 1, 4], [2, 2, 2], [1, 3, 2, 1, 6]])
def test_it_is_the_formula_written_out(sizes, bias):
    for seed in range(5):
        outcome, values, group = drawn(sizes, seed, bias=bias)
        line = fused(outcome, values, group)
        found = line.offset[:, None] + line.scale[:, None] * values
        assert found == pytest.approx(by_hand(outcome, values, group), abs=1e-9)


def test_the_components_are_those_of_an_analysis_of_variance():
    outcome, values, group = drawn([5] * 8, 3)
    weights = fused_weights(residuals_of(outcome, values), group, 8)
    residual = outcome - values[:, 0]
    for prompt in range(8):
        others = [residual[group == g] for g in range(8) if g != prompt]
        within = np.mean([np.var(x, ddof=1) for x in others])
        # F is the mean square between over that within, and the former estimates s^2 + n tau^2.
        between = within * (f_oneway(*others).statistic - 1) / 5
        assert weights.within[prompt] == pytest.approx(within)
        assert weights.between[prompt] == pytest.approx(max(between, 0.0))


def test_without_a_movement_it_is_the_shrinkage_of_v05():
    outcome, values, group = drawn([8] * 40, 1)
    values = np.repeat(values[:, :1], 6, axis=1)
    residuals = residuals_of(outcome, values)
    weights = fused_weights(residuals, group, 40)
    # Two squared within: the variance of a mean square of normal numbers.
    ratio = weights.between / np.sqrt(2 * weights.within**2 * unit_error(group[8:]))
    assert ratio.min() > 2.5
    for k in (1, 3, 7):
        w, scale = weights.at(k)
        shrinkage = k * weights.between / (k * weights.between + weights.within)
        assert w == pytest.approx(shrinkage)
        assert (scale == 1.0).all()  # nothing moves


def test_it_depends_on_nothing_that_the_rollout_itself_came_to():
    outcome, values, group = drawn([4] * 30, 2)
    before = fused(outcome, values, group)
    other = outcome.copy()
    other[5] += 10.0
    after = fused(other, values, group)
    assert (after.offset[5], after.scale[5]) == (pytest.approx(before.offset[5]), pytest.approx(before.scale[5]))
    assert after.offset[4] != pytest.approx(before.offset[4])  # of the same prompt: it is one of its others


def test_a_critic_that_is_right_stays_as_it_is_and_noise_leaves_the_groups_mean():
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(200), 8)
    chance = rng.beta(1, 1, 200)[group]
    outcome = (rng.random(1600) < chance).astype(float)
    truth = np.repeat(chance[:, None], 5, axis=1)
    right = fused(outcome, truth, group)
    assert np.array_equal(right.offset, np.zeros(1600))
    assert np.array_equal(right.scale, np.ones(1600))
    noise = rng.normal(0, 0.5, (1600, 5)) + 7.0
    noise[:, 0] = 7.0  # all rollouts of a prompt begin in one state
    line = fused(outcome, noise, group)
    assert line.response_weight.max() < 0.05
    total = np.bincount(group, outcome)[group]
    mean = (total - outcome) / 7
    found = line.offset[:, None] + line.scale[:, None] * noise
    # The group's mean, drawn in towards the critic's 7.
    assert np.corrcoef(found.mean(axis=1), mean)[0, 1] > 0.99
    assert found.mean() == pytest.approx(7.0 + line.prompt_weight.mean() * (outcome.mean() - 7.0), abs=0.02)


@pytest.mark.parametrize("sizes", [[4], [4, 4], [1, 1, 1, 1], [1, 1, 5]])
def test_too_few_prompts_give_nothing(sizes):
    outcome, values, group = drawn(sizes)
    assert fused_weights(residuals_of(outcome, values), group, len(sizes)) is None


def test_a_spread_between_prompts_within_its_error_adds_nothing():
    # Residuals without a prompt's part: in one of 160 draws the spread between prompts is that far above 0.
    rng = np.random.default_rng(0)
    added = 0
    for _ in range(200):
        outcome = rng.normal(size=240)
        group = np.repeat(np.arange(40), 6)
        line = fused(outcome, np.zeros((240, 4)), group)
        added += (line.prompt_weight > 0).any()
    assert added <= 12  # for some prompts, whose others have it
