"""`--fail-under METRIC=VALUE` and `--fail-over`: the least and the most a figure of the verdict may be.

A metric is named by its keys in `eval --json`, joined by dots: `explained_variance`, `baselines.stored.mse`,
`critics.runs/a.auc_within_group`, `by.task.sum.explained_variance`. The bounds of an interval are `.low` and `.high`.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from critic_train.errors import ConfigError
from critic_train.settings import EvalSettings
from critic_train.settings.eval import read_gate

UNDER, OVER = "--fail-under", "--fail-over"
BOUNDS = ("low", "high")
OF_THE_DATA = ("by", "monte_carlo", "rows_left_out", "files_left_out")
"""Keys below which the names depend on what was judged."""


def refuse_unknown(settings: EvalSettings, result: dict[str, Any]) -> None:
    """Refuse metrics that no verdict has, before anything is judged.

    Args:
        settings: with the gates.
        result: the result of a judgement of nothing, which has every key.

    Raises:
        ConfigError: a metric is unknown.
    """
    known = dict(_numbers(result, ""))
    wrong = []
    for flag, metric, _ in _gates(settings):
        depends = any(key in metric.split(".") for key in OF_THE_DATA)
        if metric not in known and not depends:
            # Near in spelling, or an interval without its bound.
            close = [f"{metric}.low"] if f"{metric}.low" in known else get_close_matches(metric, known, n=1)
            wrong.append(f"{flag}: no metric {metric!r}" + (f"; did you mean {close[0]}?" if close else ""))
    if wrong:
        raise ConfigError("\n".join(wrong), hint="metrics are named as in eval --json; docs/metrics.md lists them")


def judge_gates(settings: EvalSettings, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a result against the gates.

    Args:
        settings: with the gates.
        result: what `--json` prints.

    Returns:
        {flag, metric, value, found, passed, reason} each; `reason` is a sentence where the gate failed, else None.
    """
    known = dict(_numbers(result, ""))
    gates = []
    for flag, metric, value in _gates(settings):
        found = known.get(metric)
        passed = found is not None and (found >= value if flag == UNDER else found <= value)
        reason = None
        if metric not in known:
            reason = f"{metric} does not exist in this verdict"
        elif found is None:
            reason = f"{metric} does not exist for these rollouts (null)"
        elif not passed:
            reason = f"{metric} is {found:.6g}, {'below' if flag == UNDER else 'above'} {value:g}"
        gates.append(
            {"flag": flag, "metric": metric, "value": value, "found": found, "passed": passed, "reason": reason}
        )
    return gates


def _gates(settings: EvalSettings) -> Iterator[tuple[str, str, float]]:
    """(flag, metric, value) of every gate."""
    for flag, pairs in ((UNDER, settings.fail_under), (OVER, settings.fail_over)):
        for pair in pairs:
            yield flag, *read_gate(pair)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float | None]]:
    """Every number of a result and every figure that does not exist, by dotted name."""
    if path.endswith("interval"):
        for place, bound in enumerate(BOUNDS):
            yield f"{path}.{bound}", None if value is None else value[place]
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
