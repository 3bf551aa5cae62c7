"""The reward of a sample: which field it is, and a number out of a number, a boolean, a text, or a list of turns."""

import math
from dataclasses import dataclass
from typing import Any

from critic_train.convert.field_values import NUMBER, NUMBERS, OTHER, SEVERAL, TEXT, Fields, word_list
from critic_train.errors import DataError

EXACT = ("reward", "rewards", "score", "scores")
"""Names of the reward, the surest first."""
SUMS = frozenset({"total", "final", "overall", "sum", "combined"})
RIGHT = frozenset({"correct", "correctness", "success", "passed", "solved", "acc", "accuracy", "pass"})
"""Words in the names of truth values that say whether a response is right."""
NOT_THE_REWARD = frozenset({
    "mean", "std", "avg", "average", "baseline", "max", "min", "count", "num", "weight", "rate", "threshold",
    "advantage",
})  # fmt: skip
NO_REWARD_OF_TRL = frozenset({
    "step", "prompt", "completion", "advantage", "mode", "length", "len", "token", "count", "index", "idx", "id",
    "time", "epoch", "rank", "loss", "entropy", "kl",
})  # fmt: skip
"""Words in the names of numbers in a TRL table that are not of reward functions."""
TRUTHS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "correct": 1.0, "incorrect": 0.0}
NUMERIC = {NUMBER, NUMBERS}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFields:
    """How the reward is read.

    Attributes:
        names: the fields that it is, or of which it is the sum.
        description: the same in words, with what else could have been it.
        is_text: whether it is no column of numbers.
    """

    names: tuple[str, ...]
    description: str
    is_text: bool = False

    def of(self, sample: Fields) -> float | list[float]:
        """The reward of a sample; a list where it has one a turn or a token.

        Raises:
            ValueError: it is no number; the message says what it is.
        """
        names: tuple[str, ...] = self.names
        if len(names) == 1 and names[0] in EXACT and names[0] not in sample:
            names = tuple(name for name in EXACT if name in sample)[:1] or names
        parts = [number_of(sample.get(name)) for name in names]
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, list) for part in parts):
            raise ValueError("a list beside a number")
        return float(sum(part for part in parts if isinstance(part, float) and not math.isnan(part)))


def number_of(value: Any) -> float | list[float]:
    """A number, a truth value, their text, or a list of numbers, of which one alone is that number.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if text in TRUTHS:
            return TRUTHS[text]
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"the text {value[:40]!r}") from None
    if isinstance(value, list) and value and all(isinstance(entry, bool | int | float) for entry in value):
        numbers = [float(entry) for entry in value]
        return numbers[0] if len(numbers) == 1 else numbers
    raise ValueError("null" if value is None else "no number")


def reward_fields(
    samples: list[Fields], kinds: dict[str, str], renames: dict[str, str], exact_names: tuple[str, ...] = EXACT
) -> RewardFields | None:
    """Which field is the reward; None where no field is.

    The canonical name comes first, then `score`, then longer names, then truth values such as `is_correct`.

    Args:
        samples: some of a file, flat.
        kinds: field name -> what it holds.
        renames: from --column; `reward=a+b` is the sum of two fields.
        exact_names: the reward's plain names, the surest first.

    Raises:
        DataError: several fields could be it.
    """
    given = renames.get("reward", renames.get("rewards"))
    if given is not None:
        names = (given,) if given in kinds else tuple(given.split("+"))
        is_text = any(kinds.get(name) not in NUMERIC for name in names)
        return RewardFields(names=names, description=" + ".join(f"`{name}`" for name in names), is_text=is_text)
    numeric = [name for name, kind in kinds.items() if kind in NUMERIC or _is_numeric_text(samples, name, kind)]
    exact = [name for name in exact_names if name in numeric]
    inside = [name for name in numeric if name.partition(".")[0] in EXACT and "." in name]
    longer = [name for name in numeric if name not in EXACT and name not in inside and _is_reward_name(name)]
    truths = [name for name in numeric if kinds[name] != NUMBERS and _is_right(name) and _is_truth(samples, name)]
    truths = [name for name in truths if name not in inside]
    odd = (OTHER, SEVERAL, TEXT)
    texts = [_named(samples, name) for name in EXACT if kinds.get(name) in odd and name not in exact]
    if not exact and not inside and not longer and any(texts):
        raise DataError(f"{texts[0]}: that is no number", hint="--column reward=NAME takes a field of numbers")
    for candidates in (exact[:1], _sum_or_all(inside), _sum_or_all(longer), truths):
        if len(candidates) > 1 and not all(s.get(n) == s.get(candidates[0]) for s in samples for n in candidates):
            raise DataError(
                f"{' and '.join(f'`{name}`' for name in candidates)} could each be the reward",
                hint=f"say which: --column reward={candidates[0]}; or their sum: "
                f"--column reward={'+'.join(candidates)}",
            )
        if candidates:
            others = [name for name in dict.fromkeys((*exact, *inside, *longer, *truths)) if name not in candidates]
            more = f" (not {' or '.join(f'`{name}`' for name in others[:4])})" if others else ""
            is_text = kinds[candidates[0]] not in NUMERIC
            return RewardFields(names=(candidates[0],), description=f"`{candidates[0]}`{more}", is_text=is_text)
    return None


def _sum_or_all(names: list[str]) -> list[str]:
    """The one of several numbers that is named as their sum; all of them where none or several are."""
    sums = [name for name in names if set(word_list(name)) & SUMS]
    sums = sums or [name for name in names if len(names) > 1 and name.rpartition(".")[2] in ("reward", "score")]
    return sums if len(sums) == 1 else names


def verl_reward(samples: list[Fields], kinds: dict[str, str], renames: dict[str, str]) -> RewardFields | None:
    """verl's `score`, the sum of the token rewards; a `reward` beside it is a part that the reward function told of."""
    return reward_fields(samples, kinds, renames, ("score", *(name for name in EXACT if name != "score")))


def trl_reward(samples: list[Fields], kinds: dict[str, str], renames: dict[str, str]) -> RewardFields | None:
    """The sum of the columns that TRL writes for its reward functions."""
    if "reward" in renames:
        return reward_fields(samples, kinds, renames)
    numeric = [name for name, kind in kinds.items() if kind == NUMBER]
    functions = [name for name in numeric if not set(word_list(name)) & NO_REWARD_OF_TRL]
    named = [name for name in functions if set(word_list(name)) & {"reward", "score"}]
    if named and len(named) < len(functions):
        others = [name for name in functions if name not in named]
        raise DataError(
            f"{' and '.join(f'`{name}`' for name in others)} may be of a reward function or not, beside "
            f"{' and '.join(f'`{name}`' for name in named)}",
            hint=f"say which are summed: --column reward={'+'.join(named)} or --column reward={'+'.join(functions)}",
        )
    if not functions:
        return reward_fields(samples, kinds, renames)
    summed = " + ".join(f"`{name}`" for name in functions)
    return RewardFields(names=tuple(functions), description=summed + (", the sum" if len(functions) > 1 else ""))


def _named(samples: list[Fields], name: str) -> str:
    value = next((sample[name] for sample in samples if sample.get(name) is not None), None)
    return f"`{name}` holds {str(value)[:60]}" if value is not None else ""


def _is_numeric_text(samples: list[Fields], name: str, kind: str) -> bool:
    if kind != TEXT:
        return False
    values = [sample[name] for sample in samples if sample.get(name) is not None]
    try:
        return bool(values) and all(isinstance(number_of(value), float) for value in values)
    except ValueError:
        return False


def _is_reward_name(name: str) -> bool:
    last, names = word_list(name.rpartition(".")[2]), ("reward", "score")
    is_reward = bool(last) and (last[-1] in names or (last[0] in names and len(last) <= 2))
    return is_reward and not set(word_list(name)) & NOT_THE_REWARD and last[-1] not in ("model", "id")


def _is_right(name: str) -> bool:
    return bool(set(word_list(name)) & RIGHT) and not set(word_list(name)) & (NOT_THE_REWARD - {"rate"})


def _is_truth(samples: list[Fields], name: str) -> bool:
    values = [sample.get(name) for sample in samples]
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return any(entry is not None for entry in entries) and all(
        entry is None or isinstance(entry, bool) or entry in (0, 1) or str(entry).strip().lower() in TRUTHS
        for entry in entries
    )
