"""`--fail-under METRIC=VALUE`: the least a figure of the verdict must be.

A metric is named by its keys in `eval --json`, joined by dots: `explained_variance`, `baselines.stored.mse`,
`critics.runs/a.auc_within_group`, `by.task.sum.explained_variance`. The bounds of an interval are `.low` and `.high`.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from critic_train.errors import ConfigError
from critic_train.settings.eval import read_gate

BOUNDS = ("low", "high")
OF_THE_DATA = ("by", "monte_carlo", "rows_left_out", "files_left_out")
"""Keys below which the names depend on what was judged."""


def refuse_unknown(pairs: list[str], result: dict[str, Any]) -> None:
    """Refuse metrics that no verdict has, before anything is judged.

    Args:
        pairs: METRIC=VALUE each.
        result: the result of a judgement of nothing, which has every key.

    Raises:
        ConfigError: a metric is unknown.
    """
    known = dict(_numbers(result, ""))
    wrong = []
    for metric in (read_gate(pair)[0] for pair in pairs):
        depends = any(key in metric.split(".") for key in OF_THE_DATA)
        if metric not in known and not depends:
            # Near in spelling, or an interval without its bound.
            close = [f"{metric}.low"] if f"{metric}.low" in known else get_close_matches(metric, known, n=1)
            wrong.append(f"--fail-under: no metric {metric!r}" + (f"; did you mean {close[0]}?" if close else ""))
    if wrong:
        raise ConfigError("\n".join(wrong), hint="metrics are named as in eval --json; docs/metrics.md lists them")


def judge_gates(pairs: list[str], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a result against the gates.

    Args:
        pairs: METRIC=VALUE each.
        result: what `--json` prints.

    Returns:
        {metric, at_least, found, passed, reason} each; `reason` is a sentence where the gate failed, else None.
    """
    known = dict(_numbers(result, ""))
    gates = []
    for metric, least in map(read_gate, pairs):
        found = known.get(metric)
        passed = found is not None and found >= least
        reason = None
        if metric not in known:
            reason = f"{metric} does not exist in this verdict"
        elif found is None:
            reason = f"{metric} does not exist for these rollouts (null)"
        elif not passed:
            reason = f"{metric} is {found:.6g}, below {least:g}"
        gates.append({"metric": metric, "at_least": least, "found": found, "passed": passed, "reason": reason})
    return gates


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
