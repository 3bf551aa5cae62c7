"""What an evaluation has taken in: rollouts, returns and predictions, as sums and as columns of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from critic_train.errors import DataError, ModelError
from critic_train.evaluation.moments import Floats, Integers, Moments, TokenColumn
from critic_train.evaluation.token_columns import RankCorrelation, TokenStore, block_slices
from critic_train.evaluation.token_sums import Block, Cells, Population, PredictionSums, RolloutMoments, RolloutTable
from critic_train.rollouts import Rollouts

RETURNS, STORED, REWARDS = "returns", "stored", "rewards"
CRITIC = "critic:"  # keeps a critic that is called "stored" apart from the baseline


class EvalAccumulator:
    """Takes in rollouts and critics' values; critics are known here by CRITIC and their name.

    Attributes:
        positions: equal parts of a response.
        has_stored: whether every batch had stored values.
        has_rewards: whether every batch had rewards.
        smallest_return, largest_return: of all response tokens.
    """

    def __init__(
        self, critics: Sequence[str], *, cliprange_value: float | None, by: Sequence[str], positions: int
    ) -> None:
        self._critics = list(critics)
        self._cliprange = cliprange_value
        self.positions = positions
        self._table = RolloutTable(list(dict.fromkeys(by)))
        self._returns = RolloutMoments(positions)
        self._last_returns: list[TokenColumn] = []
        self._total_rewards: list[Floats] = []
        self._sums = {
            name: PredictionSums(positions, cliprange_value) for name in [STORED, *(CRITIC + c for c in critics)]
        }
        self._tokens = TokenStore([RETURNS, REWARDS, *self._sums])
        self.has_stored = self.has_rewards = True
        self.smallest_return, self.largest_return = float("inf"), float("-inf")

    def add(self, rollouts: Rollouts, values: Mapping[str, NDArray[np.float32]]) -> None:
        """See Judge.add."""
        tokens = np.flatnonzero(rollouts.response_mask)
        lengths = np.diff(np.searchsorted(tokens, rollouts.offsets))  # without a pass over all tokens
        used = np.flatnonzero(lengths)
        lengths = lengths[used]
        labels = {name: self._label(rollouts, name)[used] for name in self._table.columns}
        columns = self._columns(rollouts, values, tokens)
        for name, column in columns.items():
            require_finite(name, column, rollouts.row[used], lengths)
        self.has_stored &= STORED in columns
        self.has_rewards &= REWARDS in columns
        if not len(used):
            return
        self._table.add(rollouts.group[used], rollouts.row[used], lengths, labels)
        for name, column in columns.items():
            self._tokens.append(name, column)
        returns = columns[RETURNS]
        starts = np.cumsum(lengths) - lengths
        self._last_returns.append(returns[starts + lengths - 1])
        if REWARDS in columns:
            self._total_rewards.append(np.add.reduceat(columns.pop(REWARDS).astype(np.float64), starts))
        self.smallest_return = min(self.smallest_return, float(returns.min()))
        self.largest_return = max(self.largest_return, float(returns.max()))
        # In blocks that stay in the processor's cache.
        ends = np.append(0, np.cumsum(lengths))
        for part in block_slices(lengths):
            block = slice(ends[part.start], ends[part.stop])
            self._add_block({name: c[block] for name, c in columns.items()}, lengths[part])

    def _add_block(self, columns: dict[str, TokenColumn], lengths: Integers) -> None:
        cells = Cells.of(lengths, self.positions)
        wide = {name: column.astype(np.float64) for name, column in columns.items()}
        g, old = wide.pop(RETURNS), wide.get(STORED)
        self._returns.add(g, cells)
        for name, v in wide.items():
            self._sums[name].add(v, g, old, cells)

    def _columns(
        self, rollouts: Rollouts, values: Mapping[str, NDArray[np.float32]], tokens: Integers
    ) -> dict[str, TokenColumn]:
        """Name -> float32 [response tokens]; `tokens` are the indices of the response tokens."""
        if set(values) != set(self._critics):
            raise ValueError(f"values of {sorted(self._critics)} expected, not of {sorted(values)}")
        columns = {RETURNS: rollouts.returns} | {CRITIC + name: values[name] for name in self._critics}
        if rollouts.values is not None and self.has_stored:
            columns[STORED] = rollouts.values
        if rollouts.rewards is not None and self.has_rewards:
            columns[REWARDS] = rollouts.rewards
        for name, column in columns.items():
            if column.shape != rollouts.response_mask.shape:
                raise ValueError(f"{name}: shape {column.shape}, not {rollouts.response_mask.shape}")
        return {name: column[tokens].astype(np.float32, copy=False) for name, column in columns.items()}

    @staticmethod
    def _label(rollouts: Rollouts, name: str) -> NDArray[np.generic]:
        if name not in rollouts.labels:
            existing = ", ".join(rollouts.labels) or "none"
            raise DataError(
                f"no column {name!r} to judge by; columns with one value a rollout: {existing}",
                hint="name one of these columns, or add the column to every shard",
            )
        return rollouts.labels[name]

    def predictions(self) -> dict[str, PredictionSums]:
        """Stored values, where every batch had them, then critics."""
        return {name: s for name, s in self._sums.items() if name != STORED or self.has_stored}

    def returns(self) -> Moments:
        """Moments of each rollout's returns, in order of arrival."""
        return self._returns.moments(self._table.counts)

    def outcomes(self) -> Floats:
        """float64 [m], how each rollout ended, in order of arrival.

        The sum of its rewards; without rewards the return of its last response token, which is the reward given
        there whatever gamma and lambda the returns have.
        """
        parts: list[Floats] | list[TokenColumn] = self._total_rewards if self.has_rewards else self._last_returns
        return np.concatenate(parts).astype(np.float64) if parts else np.empty(0)

    def population(self) -> Population:
        """The rollouts sorted by prompt group and row number."""
        group, row = self._table.group, self._table.row
        order = np.lexsort((row, group))
        keys, index = np.unique(group[order], return_inverse=True)
        labels = {name: self._table.labels(name) for name in self._table.columns}
        return Population(
            order=order,
            group=index.astype(np.int64),
            groups=len(keys),
            rows=row[order],
            returns=self.returns()[order],
            by_position=self._returns.by_position,
            slices={name: (values, index[order]) for name, (values, index) in labels.items()},
        )

    def scan(self, name: str) -> Iterator[Block]:
        """One prediction's values beside the returns, in blocks of whole rollouts in order of arrival."""
        lengths = self._table.counts
        columns = (self._tokens.blocks(column, lengths) for column in (name, RETURNS))
        rewards = self._tokens.blocks(REWARDS, lengths) if self.has_rewards else None
        for part, values, returns in zip(block_slices(lengths), *columns, strict=True):
            own = lengths[part]
            yield Block(
                rollouts=part,
                owner=np.repeat(np.arange(len(own)), own),
                starts=np.cumsum(own) - own,
                lengths=own,
                values=values,
                returns=returns,
                rewards=None if rewards is None else next(rewards),
            )

    def column(self, name: str) -> Iterator[TokenColumn]:
        """A prediction's values or RETURNS, in blocks."""
        return self._tokens.blocks(name, self._table.counts)

    def replay(self, derived: "Mapping[str, Derived]") -> dict[str, PredictionSums]:
        """Sums of predictions that depend on all rollouts.

        Args:
            derived: name -> the prediction.
        """
        sums = {name: PredictionSums(self.positions, self._cliprange) for name in derived}
        lengths = self._table.counts
        stored = self._tokens.blocks(STORED, lengths) if self.has_stored else None
        returns = self._tokens.blocks(RETURNS, lengths)
        values = {name: self.derived(one) for name, one in derived.items()}
        for part, block in zip(block_slices(lengths), returns, strict=True):
            cells = Cells.of(lengths[part], self.positions)
            g = block.astype(np.float64)
            old = None if stored is None else next(stored).astype(np.float64)
            for name, column in values.items():
                sums[name].add(next(column), g, old, cells)
        return sums

    def derived(self, prediction: "Derived") -> Iterator[Floats]:
        """A derived prediction's values, float64, in blocks."""
        lengths = self._table.counts
        source = self._tokens.blocks(prediction.of, lengths) if prediction.of else None
        for part in block_slices(lengths):
            values = np.repeat(prediction.offset[part], lengths[part])
            if source is not None:
                values += np.repeat(prediction.scale[part], lengths[part]) * next(source)
            yield values

    def spearman(self, derived: "Mapping[str, Derived]") -> dict[str, float | None]:
        """Spearman's correlation of each prediction with the returns; `derived` as for `replay`."""
        lengths = self._table.counts
        ranks = RankCorrelation(lambda: self._tokens.blocks(RETURNS, lengths), int(lengths.sum()))

        def narrow(prediction: Derived) -> Iterator[TokenColumn]:
            # To float32 as all values: means that differ only by rounding are ties.
            return (values.astype(np.float32) for values in self.derived(prediction))

        figures = {}
        for name in self.predictions():
            figures[name] = ranks.against(lambda name=name: self._tokens.blocks(name, lengths))  # type: ignore[misc]
        for name, one in derived.items():
            varies = one.of or np.ptp(one.offset.astype(np.float32)) > 0.0 if len(one.offset) else False
            figures[name] = ranks.against(lambda one=one: narrow(one)) if varies else None  # type: ignore[misc]
        return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """A prediction that is made of all rollouts: of rollout i at token t, offset_i + scale_i * V_it.

    Attributes:
        offset: float64 [m], in order of arrival.
        of: name of the prediction V; empty where the value is the same at all tokens.
        scale: float64 [m]; not read without V.
    """

    offset: Floats
    of: str = ""
    scale: Floats = field(default_factory=lambda: np.empty(0))


def require_finite(name: str, column: TokenColumn, row: Integers, lengths: Integers) -> None:
    """Refuse NaN and infinity, naming the first.

    Args:
        name: of the column.
        column: float32 [T], response tokens of m rollouts.
        row: int64 [m], their row numbers in the data set.
        lengths: int64 [m], their response tokens.
    """
    finite = np.isfinite(column)
    if finite.all():
        return
    token = int(np.argmin(finite))
    ends = np.cumsum(lengths)
    rollout = int(np.searchsorted(ends, token, side="right"))
    inside = token - int(ends[rollout] - lengths[rollout])
    where = (
        f"rollout {int(row[rollout])}, response token {inside}: found {column[token]}, expected a finite number"
        f" ({int(np.count_nonzero(~finite))} such tokens in this batch)"
    )
    if name.startswith(CRITIC):
        raise ModelError(
            f"critic {name.removeprefix(CRITIC)}: {where}",
            hint="its weights may not be finite, or --precision bf16 overflows; try --precision fp32",
        )
    raise DataError(f"{'values' if name == STORED else name}: {where}")
