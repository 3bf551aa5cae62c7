"""How well values tell correct rollouts from incorrect ones: AUC, overall, within prompt groups, along the response.

The AUC is the chance that the value of a correct rollout lies above that of an incorrect one, a tie counting half
(Hanley and McNeil 1982; Mann and Whitney's U over the number of pairs). Within prompt groups only pairs of one prompt
count, and every pair has the same weight: what the critic knows of the prompt does not enter.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.evaluation.moments import Floats, Integers, pool, segment_moments, sums_by_key
from critic_train.evaluation.resampling import Resampling
from critic_train.evaluation.token_sums import Block, Cells

ROUNDING = 1e-5
"""Outcomes this close together, as a share of their range, are one: float32 GAE gives 0.99999994 for 1."""
CHUNK_NUMBERS = 2**20

Bools = NDArray[np.bool_]
Scores = NDArray[np.float32]


def correct_rollouts(outcomes: Floats) -> Bools | None:
    """bool [m], true where the outcome is the larger of two; None where there are not exactly two.

    Args:
        outcomes: float64 [m], one a rollout.
    """
    if not len(outcomes):
        return None
    low, high = float(outcomes.min()), float(outcomes.max())
    near = ROUNDING * (high - low)
    is_high, is_low = outcomes >= high - near, outcomes <= low + near
    return is_high if high > low and bool((is_high | is_low).all()) else None


class RolloutScores:
    """Mean value of each rollout, over its response and over each part of it.

    Means are kept as float32, as values are: those that differ by rounding only are ties.

    Attributes:
        overall: float32 [m], in order of arrival.
        parts: float32 [positions, m]; NaN where a response has no token in that part.
    """

    def __init__(self, rollouts: int, positions: int) -> None:
        self._positions = positions
        self.overall: Scores = np.empty(rollouts, dtype=np.float32)
        self.parts: Scores = np.full((positions, rollouts), np.nan, dtype=np.float32)

    def add(self, block: Block) -> None:
        """Take in a block."""
        cells = Cells.of(block.lengths, self._positions)
        moments = segment_moments(block.values.astype(np.float64), cells.starts, cells.counts, cells.owner)
        self.overall[block.rollouts] = pool(moments, cells.rollout, cells.rollouts).mean
        self.parts[cells.position, block.rollouts.start + cells.rollout] = moments.mean


def pairs_within(scores: Scores, correct: Bools, group: Integers, groups: int) -> tuple[Floats, Floats]:
    """Pairs of a correct and an incorrect rollout of one prompt, by sorting: m log m, however large the groups.

    Args:
        scores: float32 [m]; NaN leaves a rollout out.
        correct: bool [m].
        group: int64 [m], from 0.
        groups: their number.

    Returns:
        (float64 [groups], pairs in the right order, a tie counting half; float64 [groups], all pairs).
    """
    there = np.flatnonzero(~np.isnan(scores))
    order = there[np.lexsort((scores[there], group[there]))]
    score, key, is_correct = scores[order], group[order], correct[order]
    incorrect = np.append(0, np.cumsum(~is_correct))  # incorrect rollouts before each position
    new_group = np.append(True, key[1:] != key[:-1])[: len(key)]
    new_score = new_group | np.append(True, score[1:] != score[:-1])[: len(key)]
    begin = np.flatnonzero(new_score)  # of runs of equal scores
    end = np.append(begin[1:], len(key))
    # Wrong rollouts below, half of those in the same run, less those of the groups before.
    below = ((incorrect[begin] + incorrect[end]) / 2)[np.cumsum(new_score) - 1]
    below -= incorrect[:-1][new_group][np.cumsum(new_group) - 1]
    ordered = sums_by_key(np.where(is_correct, below, 0.0), key, groups)
    correct_counts = np.bincount(key[is_correct], minlength=groups)
    incorrect_counts = np.bincount(key[~is_correct], minlength=groups)
    return ordered, (correct_counts * incorrect_counts).astype(np.float64)


class PairsOverall:
    """Pairs of a correct and an incorrect rollout of any two prompts, with a weight for each prompt."""

    def __init__(self, scores: Scores, correct: Bools, group: Integers) -> None:
        """Args as for `pairs_within`; no score is NaN."""
        order = np.flatnonzero(~correct)
        order = order[np.argsort(scores[order])]
        ordered, mine = scores[order], scores[correct]
        self._incorrect_group, self._correct_group = group[order], group[correct]
        self._low = np.searchsorted(ordered, mine, side="left")
        self._high = np.searchsorted(ordered, mine, side="right")

    def auc(self, weights: Integers) -> Floats:
        """AUC where each prompt counts as often as it was drawn.

        Args:
            weights: int64 [k, groups].

        Returns:
            float64 [k]; NaN where only correct or only incorrect rollouts were drawn.
        """
        figures = np.empty(len(weights))
        rows = max(1, CHUNK_NUMBERS // max(1, len(self._incorrect_group) + len(self._correct_group)))
        for start in range(0, len(weights), rows):
            part = weights[start : start + rows]
            incorrect = np.zeros((len(part), len(self._incorrect_group) + 1))
            np.cumsum(part[:, self._incorrect_group], axis=1, out=incorrect[:, 1:])
            correct = part[:, self._correct_group]
            ordered = np.einsum("ij,ij->i", correct, incorrect[:, self._low] + incorrect[:, self._high]) / 2
            with np.errstate(invalid="ignore"):
                figures[start : start + rows] = ordered / (correct.sum(axis=1) * incorrect[:, -1])
        return figures


@dataclass(frozen=True, slots=True)
class Discrimination:
    """How well the values tell correct rollouts from incorrect ones; nothing where outcomes are not of two kinds.

    Attributes:
        auc: over all pairs.
        auc_within_group: over the pairs of one prompt.
        tells_apart_from: see `tells_apart_from`.
        by_position: a row for each part of the response.
        samples: "auc" and "auc_within_group" in each resample, float64 [resamples].
    """

    auc: float | None = None
    auc_within_group: float | None = None
    tells_apart_from: float | None = None
    by_position: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Floats] = field(default_factory=dict)


def discrimination(scores: RolloutScores, correct: Bools, group: Integers, resampling: Resampling) -> Discrimination:
    """AUC overall, within prompt groups and by part of the response, with intervals by resampling prompt groups.

    Args:
        scores: of one prediction.
        correct: bool [m], in order of arrival.
        group: int64 [m], from 0.
        resampling: of the groups.
    """
    groups = resampling.groups
    overall = PairsOverall(scores.overall, correct, group)
    counted = [pairs_within(x, correct, group, groups) for x in (scores.overall, *scores.parts)]
    totals = [(float(ordered.sum()), float(pairs.sum())) for ordered, pairs in counted]
    within = [ordered / pairs if pairs else None for ordered, pairs in totals]
    samples: dict[str, Floats] = {}
    intervals: list[list[float] | None] = [None] * len(counted)
    if groups >= 2:
        samples["auc"] = np.concatenate([overall.auc(part) for part in resampling.counts()])
        sums = resampling.sums(np.stack([x for both in counted for x in both], axis=1))
        with np.errstate(invalid="ignore"):
            drawn = (sums[:, 0::2] / sums[:, 1::2]).T
        samples["auc_within_group"] = drawn[0]
        intervals = [share_interval(resampling, figure, column) for figure, column in zip(within, drawn, strict=True)]
    table = [
        {
            "from": k / len(scores.parts),
            "to": (k + 1) / len(scores.parts),
            "pairs": int(totals[k + 1][1]),
            "auc_within_group": within[k + 1],
            "interval": intervals[k + 1],
        }
        for k in range(len(scores.parts))
    ]
    once_each = np.ones((1, groups), dtype=np.int64)
    return Discrimination(float(overall.auc(once_each)[0]), within[0], tells_apart_from(table), table, samples)


def auc_within_slices(
    scores: Scores, outcomes: Floats, group: Integers, index: Integers, slices: int
) -> list[float | None]:
    """AUC within prompt groups of the rollouts with each value of a column, whose own outcomes decide what is correct.

    So a column of tasks has an AUC for each task with two outcomes, even beside tasks that are scored by degrees.

    Args:
        scores: float32 [m], mean value of each rollout.
        outcomes: float64 [m].
        group: int64 [m], prompt group of each.
        index: int64 [m], each rollout's value among `slices` of them.
        slices: their number.

    Returns:
        One figure a value; None where its outcomes are not of two kinds, or no prompt has both.
    """
    order = np.argsort(index, kind="stable")
    figures: list[float | None] = []
    for mine in np.split(order, np.searchsorted(index[order], np.arange(1, slices))):
        correct = correct_rollouts(outcomes[mine])
        ordered, pairs = np.zeros(1), np.zeros(1)
        if correct is not None:
            keys, own = np.unique(group[mine], return_inverse=True)
            ordered, pairs = pairs_within(scores[mine], correct, own.astype(np.int64), len(keys))
        figures.append(float(ordered.sum() / pairs.sum()) if pairs.sum() else None)
    return figures


def tells_apart_from(table: list[dict[str, Any]]) -> float | None:
    """The share of the response after which the interval of the AUC within groups stays above one half.

    None where the last part's does not lie above it. Parts without a pair say nothing: a response of fewer tokens than
    there are parts has none in some of them, the last among these.
    """
    start = None
    for row in reversed(table):
        if not row["pairs"]:
            continue
        if row["interval"] is None or row["interval"][0] <= 0.5:
            break
        start = row["from"]
    return start


def share_interval(resampling: Resampling, figure: float | None, samples: Floats) -> list[float] | None:
    """The interval of a share of pairs, within [0, 1]; None where there is no pair."""
    bounds = None if figure is None else resampling.interval(figure, samples)
    return None if bounds is None else [max(0.0, bounds[0]), min(1.0, bounds[1])]
