"""What to tell `fit` about a data set."""

import shlex
from typing import Any

from critic_train.settings import FitSettings
from critic_train.settings.fields import default_of

HELD_BACK = 0.2
"""Share of tokens farther from their old value than the clip lets a critic go, above which the clip is in the way."""


def advice(found: dict[str, Any], settings_data: list[str], columns: list[str]) -> list[tuple[list[str], str]]:
    """Flags for `critic-train fit`, each with the reason.

    Args:
        found: what the doctor found: a survey, with "bad_rows", "returns_match" and "clip".
        settings_data: the --data that was looked at.
        columns: the --column that was needed.

    Returns:
        (flags, why), the data first.
    """
    advised: list[tuple[list[str], str]] = [([part for path in settings_data for part in ("--data", path)], "")]
    advised += [(["--column", pair], "") for pair in columns]
    if found["bad_rows"]["count"]:
        advised.append((["--on-bad-rows", "skip"], f"{found['bad_rows']['count']:,} rows cannot be used"))
    if found["returns"] is None and found["rewards"] is not None:
        advised.append((["--returns", "mc"], "there are rewards and no returns"))
    match = found["returns_match"]
    if match and match["found"] and match["lam"] < 1:
        flags = ["--returns", "mc"] + ([] if match["gamma"] == 1 else ["--gamma", f"{match['gamma']:g}"])
        advised.append((flags, "to pretrain: the stored returns lean on the stored values (lambda below 1)"))
    advised += _old_values(found)
    longest = found["tokens_of_the_longest"]
    if longest > default_of(FitSettings, "max_tokens"):
        advised.append((["--max-tokens", str(longest)], "the longest rollout goes through the model at once"))
    return advised


def command_line(advised: list[tuple[list[str], str]]) -> str:
    """The advice as a command to copy."""
    return shlex.join(["critic-train", "fit", *(part for flags, _ in advised for part in flags)])


def _old_values(found: dict[str, Any]) -> list[tuple[list[str], str]]:
    clip = found["clip"]
    if clip is None and found["values"] is not None:
        return []
    if clip is None:
        return [(["--old-values", "none"], "no values are stored")]
    if clip["held_back"] > HELD_BACK:
        reason = f"{clip['held_back']:.0%} of the returns lie farther than {clip['eps']:g} from their stored value"
        return [(["--old-values", "epoch"], f"{reason}: a clip around it would keep the critic from them")]
    return []
