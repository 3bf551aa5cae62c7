"""Statistics of a data set in one pass and flat memory: counts, lengths, distributions, duplicates, prefix sharing.

What needs rollouts side by side is computed on a sample of entire prompt groups, of bounded size, which does not depend
on the order in which the rollouts come.
"""

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.alignment import first_of
from critic_train.data.labels import prompt_keys
from critic_train.data.order import mixed
from critic_train.evaluation.judge import Judge
from critic_train.layers.prefix_tree import prefix_order
from critic_train.rollouts import Rollouts, concat_rollouts, offsets_from_lengths

SAMPLE_TOKENS = 2**22
SEED = 0x5EED


class GroupSample:
    """Keeps the prompt groups whose hashed key is smallest, as many as fit (a bottom-k sketch of the groups).

    The sample has every rollout of its groups, wherever in the data set they are. It is the data set as long as that
    fits.

    Args:
        most_tokens: tokens of the sample; a single group larger than that is not cut.

    Attributes:
        is_everything: whether nothing was left out.
    """

    def __init__(self, most_tokens: int = SAMPLE_TOKENS) -> None:
        self.is_everything = True
        self._most_tokens = most_tokens
        self._parts: list[Rollouts] = []
        self._tokens = 0
        self._limit = 2**64
        """Groups hashed at or above it were dropped once, and stay so."""

    def add(self, rollouts: Rollouts) -> None:
        """Add some rollouts."""
        ranks = mixed(rollouts.group, SEED)
        selected = _below(ranks, self._limit)
        if not selected.all():
            self.is_everything = False
            rollouts = rollouts.take(np.flatnonzero(selected))
        if not len(rollouts):
            return
        self._parts.append(replace(rollouts, labels={}))
        self._tokens += len(rollouts.input_ids)
        if self._tokens > 2 * self._most_tokens:
            self._shrink()

    def rollouts(self) -> Rollouts | None:
        """The sample, prompt groups together; None without rollouts."""
        if not self._parts:
            return None
        self._shrink()
        (sample,) = self._parts
        return sample.take(np.argsort(sample.group, kind="stable"))

    def _shrink(self) -> None:
        """Drop the groups of largest hash until the rest fits; one group always stays."""
        sample = concat_rollouts(self._parts)
        ranks = mixed(sample.group, SEED)
        order = np.argsort(ranks, kind="stable")
        tokens = np.cumsum(sample.lengths[order])
        first_out = int(np.searchsorted(tokens, self._most_tokens, side="right"))
        if first_out < len(order):
            limit = max(int(ranks[order[first_out]]), int(ranks[order[0]]) + 1)
            sample = sample.take(np.flatnonzero(_below(ranks, limit)))
            self.is_everything &= len(sample) == len(order)
            self._limit = limit
        self._parts, self._tokens = [sample], len(sample.input_ids)


def _below(ranks: NDArray[np.uint64], limit: int) -> NDArray[np.bool_]:
    return ranks < np.uint64(limit) if limit < 2**64 else np.ones(len(ranks), dtype=np.bool_)


BINS = 20
QUANTILES = (0.05, 0.5, 0.95)
DISTINCT = 12
"""Distinct values above which a distribution is described by its histogram alone."""


class Survey:
    """Accumulates rollouts batch by batch; `summary` describes them.

    Memory: about 40 bytes a rollout, and a sample of bounded size for what needs rollouts side by side.

    Attributes:
        sample: entire prompt groups.
        tokens, response_tokens: of all rollouts.
        max_token_id: the largest id, -1 where there are none.
        longest: tokens of the longest rollout.
        has_rewards, has_truncated: whether every batch had them.
    """

    def __init__(self) -> None:
        self.sample = GroupSample()
        self._judge = Judge([])
        self._prompt_lengths: list[NDArray[np.int64]] = []
        self._response_lengths: list[NDArray[np.int64]] = []
        self._groups: list[NDArray[np.int64]] = []
        self._prompts: list[NDArray[np.int64]] = []
        self._contents: list[NDArray[np.int64]] = []
        self._reward_sums: list[NDArray[np.float64]] = []
        self._truncated = self._response_span = self.response_tokens = self.tokens = 0
        self.has_rewards = self.has_truncated = True
        self.max_token_id = -1
        self.longest = 0

    def add(self, rollouts: Rollouts) -> None:
        """Add some rollouts."""
        prompt_lengths = first_of(rollouts.response_mask, rollouts.lengths)
        counts = rollouts.response_counts
        self._prompt_lengths.append(prompt_lengths)
        self._response_lengths.append(counts)
        self._groups.append(rollouts.group)
        self._prompts.append(prompt_keys(rollouts))
        self._contents.append(_content_keys(rollouts))
        self.tokens += len(rollouts.input_ids)
        self.response_tokens += int(counts.sum())
        self._response_span += int((rollouts.lengths - prompt_lengths).sum())
        self.max_token_id = max(self.max_token_id, int(rollouts.input_ids.max(initial=-1)))
        self.longest = max(self.longest, int(rollouts.lengths.max(initial=0)))
        if rollouts.rewards is None:
            self.has_rewards = False
        else:
            owner = np.repeat(np.arange(len(rollouts)), counts)
            masked = rollouts.rewards[rollouts.response_mask].astype(np.float64)
            self._reward_sums.append(np.bincount(owner, masked, len(rollouts)).astype(np.float64))
        if rollouts.truncated is None:
            self.has_truncated = False
        else:
            self._truncated += int(rollouts.truncated.sum())
        self.sample.add(rollouts)
        self._judge.add(rollouts, {})

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64 [n], the prompt group of every rollout, in order of arrival."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._groups])

    @property
    def prompts(self) -> NDArray[np.int64]:
        """int64 [n], a key of the tokens before the response."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._prompts])

    @property
    def response_counts(self) -> NDArray[np.int64]:
        """int64 [n], response tokens of every rollout."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._response_lengths])

    def summary(self) -> dict[str, Any]:
        """Everything, ready for JSON; None stands for what does not exist."""
        groups, prompts = self.groups, self.prompts
        lengths = np.concatenate(self._prompt_lengths), np.concatenate(self._response_lengths)
        sample = self.sample.rollouts()
        verdict = self._judge.verdict()
        stored = verdict["baselines"].get("stored")
        judged = ("explained_variance", "explained_variance_interval", "explained_variance_within_group", "bias")
        return {
            "rollouts": len(groups),
            "prompt_groups": len(np.unique(groups)),
            "prompts": len(np.unique(prompts)),
            "group_size": lengths_of(np.unique(groups, return_counts=True)[1]),
            "tokens": self.tokens,
            "response_tokens": self.response_tokens,
            "mask_share": self.response_tokens / self._response_span if self._response_span else None,
            "prompt_length": lengths_of(lengths[0]),
            "response_length": lengths_of(lengths[1]),
            "returns": verdict["returns"] | self._distribution(sample, "returns"),
            "values": self._distribution(sample, "values") or None,
            "rewards": distribution(np.concatenate(self._reward_sums)) if self.has_rewards else None,
            "truncated": self._truncated if self.has_truncated else None,
            "stored_values": None if stored is None else {name: stored[name] for name in judged},
            "group_mean": {name: verdict["baselines"]["group_mean"][name] for name in judged},
            "sharing": None if sample is None else sharing(sample),
            "sample": {
                "rollouts": 0 if sample is None else len(sample),
                "is_everything": self.sample.is_everything,
            },
            "tokens_of_the_longest": self.longest,
            "duplicates": self._duplicates(),
        }

    def _distribution(self, sample: Rollouts | None, name: str) -> dict[str, Any]:
        column = None if sample is None else getattr(sample, name)
        return {} if column is None or sample is None else distribution(column[sample.response_mask])

    def _duplicates(self) -> int:
        """Rollouts beyond the first with the same tokens."""
        contents = np.concatenate([np.zeros(0, dtype=np.int64), *self._contents])
        return len(contents) - len(np.unique(contents))


def lengths_of(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Counts, int64 [n], as min, quantiles, max, mean and a histogram of whole numbers."""
    if not len(counts):
        return {"min": None, "max": None, "mean": None, "histogram": None}
    low, high = int(counts.min()), int(counts.max())
    width = max(1, -(-(high - low + 1) // BINS))
    edges = np.arange(low, high + width + 1, width)
    return {
        "min": low,
        **{f"p{round(100 * q)}": int(np.quantile(counts, q, method="inverted_cdf")) for q in QUANTILES},
        "max": high,
        "mean": float(counts.mean()),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(counts, edges)[0].tolist()},
    }


def distribution(numbers: NDArray[np.floating]) -> dict[str, Any]:
    """Numbers, float [n], as quantiles, a histogram, and how often each value occurs where there are few."""
    if not len(numbers):
        return {}
    wide = numbers.astype(np.float64)
    distinct = Counter(np.round(wide, 6).tolist()) if len(np.unique(wide[:1000])) <= DISTINCT else Counter()
    counts, edges = np.histogram(wide, BINS)
    return {
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "min": float(wide.min()),
        **{f"p{round(100 * q)}": float(np.quantile(wide, q)) for q in QUANTILES},
        "max": float(wide.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "distinct": {f"{value:g}": count for value, count in sorted(distinct.items())}
        if 0 < len(distinct) <= DISTINCT
        else None,
    }


def sharing(rollouts: Rollouts) -> dict[str, Any]:
    """How many tokens a forest computes, and what share of all that saves."""
    shared = int(prefix_order(rollouts).shared.sum())
    tokens = len(rollouts.input_ids)
    width = int(rollouts.lengths.max())
    return {
        "tokens": tokens,
        "computed_tokens": tokens - shared,
        "saved_share": shared / tokens,
        "padded_tokens": width * len(rollouts),
    }


def leak(survey: Survey, other: Survey) -> dict[str, Any]:
    """Prompts and prompt groups that stand in both data sets."""
    mine, theirs = np.unique(survey.prompts), np.unique(other.prompts)
    both = np.isin(survey.prompts, np.intersect1d(mine, theirs))
    return {
        "prompts": int(np.isin(mine, theirs).sum()),
        "of_prompts": len(mine),
        "rollouts": int(both.sum()),
        "groups": int(np.isin(np.unique(survey.groups), np.unique(other.groups)).sum()),
    }


def _content_keys(rollouts: Rollouts) -> NDArray[np.int64]:
    """int64 [n]: a key of all tokens of a rollout."""
    ids = rollouts.input_ids.tobytes()
    bounds = pairwise((4 * offsets_from_lengths(rollouts.lengths)).tolist())
    digests = b"".join(hashlib.blake2b(ids[start:stop], digest_size=8).digest() for start, stop in bounds)
    return np.frombuffer(digests, dtype=np.int64)
