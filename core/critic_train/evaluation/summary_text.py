"""The verdict in a few sentences. Whether they say yes, no or cannot tell follows from the interval alone."""

from collections.abc import Sequence
from typing import Any

OFFSET_SHARE = 0.1
"""Share of the squared error from which on a constant offset is mentioned."""
SATURATION = 0.05
"""Share of tokens without a gradient from which on the clip is mentioned."""
EXCESS = 0.02
"""Difference of explained variance against the returns and against Monte-Carlo returns that is mentioned."""
CHANCE = 0.5
"""AUC of a random guess."""


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
    return sentences + _between(list(critics), verdict)


def _of_one(metrics: dict[str, Any], verdict: dict[str, Any]) -> list[str]:
    if not verdict["response_tokens"]:
        return ["no rollouts: there is nothing to judge on"]
    if metrics["explained_variance"] is None:
        return ["the returns do not vary: there is nothing to explain"]
    sentences = [_against_constant(metrics)]
    if verdict["prompt_groups"] >= 2:
        sentences += [_against_group_mean(metrics, verdict), _within_groups(metrics)]
        sentences += _against_stored(metrics, verdict)
        sentences += _outcomes_apart(metrics) + _variance_left(metrics) + _against_monte_carlo(metrics)
    return sentences + _remarks(metrics)


def _against_constant(metrics: dict[str, Any]) -> str:
    interval = metrics["explained_variance_interval"]
    shown = f"explained variance {_number(metrics['explained_variance'])}"
    if interval is None:
        return f"cannot tell whether it beats the constant baseline: {shown}, from one prompt group only"
    shown += f" (95 % interval {_range(interval)})"
    match sign(interval):
        case 1:
            return f"beats the constant baseline: {shown}"
        case -1:
            return f"is worse than the constant baseline: {shown}; it would raise the variance of advantages"
        case 0 if interval[0] == interval[1]:
            return f"is no better than the constant baseline: {shown}"
    return f"cannot tell whether it beats the constant baseline: {shown}"


def _against_group_mean(metrics: dict[str, Any], verdict: dict[str, Any]) -> str:
    mean = verdict["baselines"]["group_mean"]
    if mean["lone_rollouts"] == verdict["rollouts"]:
        return "every prompt has one rollout only: there is no prompt group's mean to beat"
    versus = metrics["explained_variance_minus"]["group_mean"]
    what = f"the prompt group's mean ({_number(mean['explained_variance'])})"
    apart = _apart(versus)
    match sign(versus["interval"]):
        case 1:
            return f"beats {what}: explained variance {apart}, more than GRPO's baseline gives"
        case -1:
            return (
                f"does not beat {what}: explained variance {apart}; it adds no token-level credit over GRPO's baseline"
            )
    return f"cannot tell whether it beats {what}, GRPO's baseline: explained variance {apart}"


def _within_groups(metrics: dict[str, Any]) -> str:
    figure = metrics["explained_variance_within_group"]
    interval = metrics["explained_variance_within_group_interval"]
    if figure is None or interval is None:
        return "within prompt groups the returns do not vary: only differences between prompts can be explained"
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
