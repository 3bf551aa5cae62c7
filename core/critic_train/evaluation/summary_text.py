"""The verdict in a few sentences. Whether they say yes, no or cannot tell follows from the interval alone."""

import math
from collections.abc import Sequence
from typing import Any

from critic_train.evaluation.metrics import group_size
from critic_train.evaluation.worth import MOST

OFFSET_SHARE = 0.1
"""Share of the squared error from which on a constant offset is mentioned."""
SATURATION = 0.05
"""Share of tokens without a gradient from which on the clip is mentioned."""
EXCESS = 0.02
"""Difference of explained variance against the returns and against Monte-Carlo returns that is mentioned."""
CHANCE = 0.5
"""AUC of a random guess."""
ENOUGH_GROUPS = 30
"""Prompts that are advised where there are too few for an interval."""
MOST_GROUPS = 100_000
"""Where more prompts than this were needed, two figures are as good as equal."""


def summary_text(verdict: dict[str, Any]) -> list[str]:
    """Put a verdict into words.

    Args:
        verdict: what `Judge.verdict` returned.

    Returns:
        Sentences without a full stop, the one that matters most first. Where several critics were judged,
        each sentence begins with the name of its critic and a colon. Without critics the sentences are about the
        stored values; without those there are none.
    """
    critics = verdict["critics"]
    stored = verdict["baselines"].get("stored")
    if not critics:
        return [] if stored is None else [f"stored values: {s}" for s in _of_one(stored, verdict)]
    sentences = []
    for name, metrics in critics.items():
        start = f"{name}: " if len(critics) > 1 else ""
        sentences += [start + sentence for sentence in _of_one(metrics, verdict)]
    return sentences + _between(list(critics), verdict) + _prompt_share(verdict)


def _of_one(metrics: dict[str, Any], verdict: dict[str, Any]) -> list[str]:
    if not verdict["response_tokens"]:
        return ["no rollouts: there is nothing to judge on"]
    if metrics["explained_variance"] is None:
        return ["the returns do not vary: there is nothing to explain"]
    groups = verdict["prompt_groups"]
    sentences = [_against_constant(metrics, groups), *_against_group_mean(metrics, verdict)]
    if metrics["explained_variance_interval"] is not None:
        peers = verdict["baselines"]["group_mean"]["explained_variance"] is not None
        sentences += [_within_groups(metrics)] if peers else []
        sentences += _against_stored(metrics, verdict)
        sentences += _outcomes_apart(metrics) + _variance_left(metrics) + _fused(metrics) + _worth(metrics)
        sentences += _against_monte_carlo(metrics)
    return sentences + _remarks(metrics)


def _against_constant(metrics: dict[str, Any], groups: int) -> str:
    interval = metrics["explained_variance_interval"]
    figure = metrics["explained_variance"]
    shown = f"explained variance {_number(figure)}"
    if interval is None:
        return f"cannot tell whether it beats the constant baseline: {shown}, from {too_few(groups)}"
    shown += f" (95 % interval {_range(interval)})"
    match sign(interval):
        case 1:
            return f"beats the constant baseline: {shown}"
        case -1:
            return f"is worse than the constant baseline: {shown}; it would raise the variance of advantages"
        case 0 if interval[0] == interval[1]:
            return f"is no better than the constant baseline: {shown}"
    return f"cannot tell whether it beats the constant baseline: {shown}{_settled_by(figure, interval, groups)}"


def _against_group_mean(metrics: dict[str, Any], verdict: dict[str, Any]) -> list[str]:
    mean, groups = verdict["baselines"]["group_mean"], verdict["prompt_groups"]
    if mean["explained_variance"] is None or mean["lone_rollouts"] == verdict["rollouts"]:
        return ["every prompt has one rollout only: there is no prompt group's mean to compare with"]
    versus = metrics["explained_variance_minus"]["group_mean"]
    what = f"the prompt group's mean ({_number(mean['explained_variance'])})"
    apart = _apart(versus)
    match sign(versus["interval"]):
        case None if groups < 2:
            return []
        case 1:
            return [f"beats {what}: explained variance {apart}, more than GRPO's baseline gives"]
        case -1:
            return [
                f"does not beat {what}: explained variance {apart}; it adds no token-level credit over GRPO's baseline"
            ]
    settled = _settled_by(versus["difference"], versus["interval"], groups)
    return [f"cannot tell whether it beats {what}, GRPO's baseline: explained variance {apart}{settled}"]


def _within_groups(metrics: dict[str, Any]) -> str:
    figure = metrics["explained_variance_within_group"]
    interval = metrics["explained_variance_within_group_interval"]
    if figure is None:
        return "within prompt groups the returns do not vary: only differences between prompts can be explained"
    if interval is None:
        return f"cannot tell whether it explains anything within prompt groups: {_number(figure)}, without an interval"
    shown = f"{_number(figure)} ({_range(interval)})"
    match sign(interval):
        case 1:
            return f"within prompt groups it explains {shown}: it tells rollouts of one prompt apart"
        case -1:
            return f"within prompt groups it explains nothing: {shown}; it adds noise there"
        case 0 if interval[0] == interval[1]:
            return f"within prompt groups it explains nothing: {shown}"
    return f"cannot tell whether it explains anything within prompt groups: {shown}"


def _against_stored(metrics: dict[str, Any], verdict: dict[str, Any]) -> list[str]:
    versus = metrics["explained_variance_minus"].get("stored")
    if versus is None or versus["interval"] in (None, [0.0, 0.0]):  # no stored values, or judged against itself
        return []
    what = f"the stored values ({_number(verdict['baselines']['stored']['explained_variance'])})"
    apart = _apart(versus)
    match sign(versus["interval"]):
        case 1:
            return [f"beats {what}: explained variance {apart}"]
        case -1:
            return [f"is worse than {what}: explained variance {apart}"]
    return [f"cannot tell whether it beats {what}: explained variance {apart}"]


def _outcomes_apart(metrics: dict[str, Any]) -> list[str]:
    figure, interval = metrics.get("auc_within_group"), metrics.get("auc_within_group_interval")
    if figure is None or interval is None:
        return []
    shown = f"within prompts, AUC {_number(figure)} ({_range(interval)})"
    if interval[1] < CHANCE:
        return [f"calls wrong rollouts better than right ones: {shown}"]
    start = metrics["tells_apart_from"]
    if start is None:
        chance = "cannot tell whether it tells" if interval[0] <= CHANCE else "on the whole it tells"
        end = "" if interval[0] <= CHANCE else ", but not at the end of the response"
        return [f"{chance} right rollouts from wrong ones{end}: {shown}"]
    when = "from the first token on" if start == 0 else f"from {100 * start:.0f} % of the response on"
    return [f"tells right rollouts from wrong ones {when}: {shown}"]


def _variance_left(metrics: dict[str, Any]) -> list[str]:
    figure, interval = metrics.get("variance_reduction"), metrics.get("variance_reduction_interval")
    if figure is None or interval is None:
        return []
    shown = f"than GRPO's: {_percent(figure)} ({_percents(interval)})"
    match sign(interval):
        case 1:
            return [f"PPO's advantages vary less with it {shown}"]
        case -1:
            turned = [-interval[1], -interval[0]]
            return [f"PPO's advantages vary more with it than GRPO's: {_percent(-figure)} ({_percents(turned)})"]
    return [f"cannot tell whether PPO's advantages vary less with it {shown}"]


def _fused(metrics: dict[str, Any]) -> list[str]:
    """Whether to mix: the fused baseline beside the critic alone, and beside GRPO's baseline."""
    fused = metrics.get("fused") or {}
    than_grpo = fused.get("variance_reduction_interval")
    than_critic = (fused.get("variance_reduction_minus") or {}).get("critic") or {}
    if than_grpo is None or than_critic.get("interval") is None:
        return []
    shown = f"{_percent(fused['variance_reduction'])} ({_percents(than_grpo)}) less than GRPO's"
    helps, beats = sign(than_critic["interval"]) == 1, sign(than_grpo)
    what = "fused with the prompt's other rollouts its advantages vary"
    if helps and beats == 1:
        return [f"best of all fused: {what} less than with it alone, and {shown}"]
    if helps:
        end = ", not as little as GRPO's" if beats == -1 else f"; cannot tell whether less than GRPO's: {shown}"
        return [f"{what} less than with it alone{end}"]
    if beats == 1:
        return [f"{what} {shown}: not shown to be less than with it alone"]
    return [f"cannot tell whether fusing helps: {what} {shown}"]


def _worth(metrics: dict[str, Any]) -> list[str]:
    """In rollouts: the group whose mean does as well, and how many rollouts the fused baseline needs."""
    figure, interval = metrics.get("worth_in_rollouts"), metrics.get("worth_in_rollouts_interval")
    worth = metrics.get("worth") or {}
    if figure is None:
        return []
    if figure >= MOST:
        shown = "alone it leaves less variance than the mean of any group, however large"
    else:
        bounds = f" ({group_size(interval[0])} to {group_size(interval[1])})" if interval else ""
        shown = f"alone it is worth the mean of a group of {group_size(figure)}{bounds}"
    typical, needed = worth.get("rollouts_a_prompt"), worth.get("rollouts_with_fused")
    if typical is None or needed is None or needed >= typical or needed == 1:
        return [shown]
    return [f"{shown}; fused, {needed} rollouts a prompt do what {typical} do without it"]


def _prompt_share(verdict: dict[str, Any]) -> list[str]:
    """What any baseline that knows the prompt alone can explain at most."""
    share, interval = verdict.get("between_prompt_share"), verdict.get("between_prompt_share_interval")
    if share is None:
        return []
    shown = f"{_percent(share)}" + (f" ({_percents(interval)})" if interval else "")
    return [f"{shown} of the outcomes' variance lies between prompts, the most that the prompt alone can explain"]


def too_few(groups: int) -> str:
    """Why there is no interval, and what would give one."""
    if groups >= ENOUGH_GROUPS:
        return f"{groups:,} prompts of which a few hold most of the variance: too few for an interval"
    prompts = "one prompt" if groups == 1 else f"{groups} prompts"
    return f"{prompts}: too few for an interval, which takes {ENOUGH_GROUPS} or more"


def _settled_by(figure: float | None, interval: Sequence[float] | None, groups: int) -> str:
    """How many prompts would tell a figure from 0, since an interval narrows with their square root."""
    if not figure or not interval or interval[0] == interval[1]:
        return ""
    # The end that reaches beyond 0 has to come in to 0.
    reach = figure - interval[0] if figure > 0 else interval[1] - figure
    needed = groups * (reach / abs(figure)) ** 2
    if needed > MOST_GROUPS:
        return "; the two are as good as equal"
    digits = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    return f"; about {math.ceil(needed / digits) * digits:,} prompts would tell"


def _against_monte_carlo(metrics: dict[str, Any]) -> list[str]:
    """Only where it is another figure than against the returns: bootstrapped returns flatter a critic."""
    against = metrics.get("monte_carlo")
    if against is None or against["explained_variance"] is None or against["explained_variance_interval"] is None:
        return []
    excess = against["explained_variance_excess"]
    other = sign(against["explained_variance_interval"]) != sign(metrics["explained_variance_interval"])
    apart = bool(sign(excess["interval"])) and abs(excess["difference"]) >= EXCESS
    if not other and not apart:
        return []
    figure, interval = against["explained_variance"], against["explained_variance_interval"]
    flatters = "; the returns flatter it" if excess["difference"] > 0 else ""
    return [f"against Monte-Carlo returns explained variance is {_number(figure)} ({_range(interval)}){flatters}"]


def _remarks(metrics: dict[str, Any]) -> list[str]:
    remarks = []
    bias, mse = metrics["bias"], metrics["mse"]
    if mse > 0 and bias * bias > OFFSET_SHARE * mse:
        side = "above" if bias > 0 else "below"
        remarks.append(
            f"its values lie {_number(abs(bias))} {side} the returns on average, which explained variance ignores"
        )
    saturation = metrics["saturation"]
    if saturation is not None and saturation >= SATURATION:
        remarks.append(f"{100 * saturation:.0f} % of tokens lie beyond the clip and have no gradient")
    return remarks


def _between(names: list[str], verdict: dict[str, Any]) -> list[str]:
    sentences = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            versus = verdict["differences"][f"{a} - {b}"]
            direction = sign(versus["interval"])
            if versus["difference"] is None:
                continue
            if not direction:
                sentences.append(f"cannot tell {a} from {b}: explained variance {_apart(versus)}")
                continue
            better, worse = (a, b) if direction > 0 else (b, a)
            sentences.append(f"{better} beats {worse}: explained variance {_apart(versus, absolute=True)}")
    return sentences


def sign(interval: Sequence[float] | None) -> int | None:
    """1 where the whole interval is above 0, -1 where it is below, 0 across it; None where there is none."""
    if not interval:
        return None
    return int(interval[0] > 0) - int(interval[1] < 0)


def _apart(versus: dict[str, Any], *, absolute: bool = False) -> str:
    """`higher by 0.05 (0.02 to 0.08)`; an interval across 0 is shown as it is, with its sign."""
    figure, interval = versus["difference"], versus["interval"]
    if interval is None:
        return f"differs by {_number(figure)}"
    if sign(interval) == 0:
        return f"differs by {_number(figure)} ({_range(interval)})"
    turned = sorted(abs(bound) for bound in interval)
    word = "higher" if figure > 0 or absolute else "lower"
    return f"{word} by {_number(abs(figure))} ({_range(turned)})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percents(interval: list[float]) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"


def _range(interval: list[float]) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}"


def _number(x: float) -> str:
    """Two decimals; more where they would hide that a figure is not 0, fewer where it is huge."""
    if x == 0 or 0.005 <= abs(x) < 1000:
        return f"{x:.2f}"
    return f"{x:.1g}" if abs(x) < 1 else f"{x:.3g}"
