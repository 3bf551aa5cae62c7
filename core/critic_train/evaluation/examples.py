"""A few rollouts, token by token, for people to read: the worst, the best, and a seeded random sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.order import mixed
from critic_train.evaluation.moments import Floats
from critic_train.rollouts import Rollouts

WORST, BEST, SWING, DRAWN = "worst", "best", "swing", "drawn"
COUNTS = {WORST: 3, BEST: 2, SWING: 3, DRAWN: 4}
"""Why a rollout is shown -> how many: the largest and the smallest mean squared error, the largest range of values
within one response, and a random sample."""

PROMPT_TOKENS, RESPONSE_TOKENS = 160, 480
"""Tokens shown of a rollout: the prompt's last and the response's first."""


@dataclass(slots=True)
class Examples:
    """Keeps a bounded number of rollouts out of any number, the same whatever their order and batches.

    Attributes:
        seed: of the random sample.
        uids: gives the uids of rows of the data set, for the names of their prompt groups.
    """

    seed: int = 0
    uids: Callable[[Sequence[int]], dict[int, str | None]] | None = None
    _best_of: dict[tuple[str, str], list[tuple[float, int, dict[str, Any]]]] = field(default_factory=dict)

    def add(self, rollouts: Rollouts, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Take in rollouts, complete, and each critic's values of their tokens, as `Judge.add` does.

        Args:
            rollouts: n rollouts, T tokens.
            values: critic name -> float32 [T].
        """
        judged = np.flatnonzero(rollouts.response_counts)
        if not len(judged):
            return
        for critic, column in values.items():
            scores = self._scores(rollouts, column, judged)
            for why, score in scores.items():
                shown = self._best_of.setdefault((critic, why), [])
                # Ties go to the earlier row; a batch adds no more than are shown in the end.
                lowest = np.lexsort((rollouts.row[judged], score))[: COUNTS[why]]
                shown += [
                    (float(score[i]), int(rollouts.row[judged[i]]), _example(rollouts, column, int(judged[i])))
                    for i in lowest
                    if len(shown) < COUNTS[why] or (score[i], rollouts.row[judged[i]]) < shown[COUNTS[why] - 1][:2]
                ]
                shown.sort(key=lambda entry: entry[:2])
                del shown[COUNTS[why] :]

    def records(self) -> list[dict[str, Any]]:
        """The rollouts, ready for JSON; one that is shown for several reasons stands under the first of them.

        Returns:
            critic, why ("worst", "best", "swing" or "drawn"), row (its number in the data), uid (of its prompt group),
            tokens and shown_from (tokens of the rollout, and the first that is shown), mse, mean_value,
            mean_return; then one entry a token shown: input_ids, response_mask, values, returns and, where the shards
            store them, old_values.
        """
        records: list[dict[str, Any]] = []
        seen: set[tuple[str, int]] = set()
        for (critic, why), shown in self._best_of.items():
            for _, row, example in shown:
                if (critic, row) not in seen:
                    seen.add((critic, row))
                    records.append({"critic": critic, "why": why, "row": row, "uid": None, **example})
        uids = self.uids([example["row"] for example in records]) if self.uids else {}
        return [example | {"uid": uids.get(example["row"])} for example in records]

    def _scores(self, rollouts: Rollouts, values: NDArray[np.float32], judged: NDArray[np.int64]) -> dict[str, Floats]:
        """Reason -> float64 [m]; the rollouts with the smallest are shown."""
        tokens = np.flatnonzero(rollouts.response_mask)
        counts = rollouts.response_counts[judged]
        starts = np.cumsum(counts) - counts
        v, g = values[tokens].astype(np.float64), rollouts.returns[tokens].astype(np.float64)
        mse = np.add.reduceat(np.square(v - g), starts) / counts
        swing = np.maximum.reduceat(v, starts) - np.minimum.reduceat(v, starts)
        return {WORST: -mse, BEST: mse, SWING: -swing, DRAWN: _random_order(rollouts.row[judged], self.seed)}


def _random_order(row: NDArray[np.int64], seed: int) -> Floats:
    """float64 [m] in [0, 1): a hash of each row number and the seed, the same in any order."""
    with np.errstate(over="ignore"):
        keys = (row.astype(np.uint64) + np.uint64(1) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(keys.view(np.int64), 0).astype(np.float64) / 2.0**64


def _example(rollouts: Rollouts, values: NDArray[np.float32], i: int) -> dict[str, Any]:
    start, stop = int(rollouts.offsets[i]), int(rollouts.offsets[i + 1])
    masked = np.flatnonzero(rollouts.response_mask[start:stop])
    own_values, own_returns = values[start:stop][masked], rollouts.returns[start:stop][masked]
    first = start + max(0, int(masked[0]) - PROMPT_TOKENS)
    last = min(stop, start + int(masked[0]) + RESPONSE_TOKENS)
    shown = slice(first, last)
    error = own_values.astype(np.float64) - own_returns
    example: dict[str, Any] = {
        "tokens": stop - start,
        "shown_from": first - start,
        "mse": float(np.square(error).mean()),
        "mean_value": float(own_values.mean(dtype=np.float64)),
        "mean_return": float(own_returns.mean(dtype=np.float64)),
        "input_ids": rollouts.input_ids[shown].tolist(),
        "response_mask": rollouts.response_mask[shown].tolist(),
        "values": _short(values[shown]),
        "returns": _short(rollouts.returns[shown]),
    }
    if rollouts.values is not None:
        example["old_values"] = _short(rollouts.values[shown])
    return example


def _short(column: NDArray[np.float32]) -> list[float | None]:
    """Floats with the digits that float32 has and no more; None where not finite, as off the response mask."""
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in column.tolist()]
