"""The columns that `predict` computes, and the files it writes them into."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.columns import Needs, understand
from critic_train.data.copying import copied, schema_of
from critic_train.data.shards import Shard
from critic_train.predicting.columns import Filled, FilledRows, filled_in, with_columns
from critic_train.predicting.whitening import Whitening
from critic_train.returns.recipe import ReturnRecipe
from critic_train.rollouts import Rollouts
from critic_train.settings.predict import Written
from critic_train.stopping import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class NewColumns:
    """What is written.

    Attributes:
        recipe: how returns and advantages are made.
        written: the columns wanted.
    """

    recipe: ReturnRecipe
    written: tuple[Written, ...]

    @property
    def computes(self) -> bool:
        """Whether rewards are needed."""
        return any(name != "values" for name in self.written)

    def of(self, rollouts: Rollouts, values: NDArray[np.float32], whitening: Whitening | None) -> Filled:
        """The new columns of some rollouts. Cut ones that are dropped get values only.

        Args:
            rollouts: with rewards where the recipe needs them.
            values: float32 [T], this critic's.
            whitening: of the advantages; None leaves them as they are.
        """
        everyone = np.ones(len(rollouts), dtype=np.bool_)
        columns: dict[str, NDArray[np.float32]] = {}
        for name in self.written:
            if name == "values":
                columns[name] = values
            elif name == "returns":
                columns[name] = self.recipe.returns(rollouts, values)
            else:
                advantages = self.recipe.advantages(rollouts, values)
                if whitening is not None:
                    advantages = np.where(rollouts.response_mask, whitening.apply(advantages), 0.0)
                columns[name] = advantages.astype(np.float32)
        targeted = self._targeted(rollouts)
        return Filled(
            row=rollouts.row,
            offsets=rollouts.offsets,
            columns=columns,
            known={name: everyone if name == "values" else targeted for name in self.written},
        )

    def advantages(self, rollouts: Rollouts, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """float64, the advantages that whitening is over: of every response token that gets one."""
        counted = rollouts.response_mask & np.repeat(self._targeted(rollouts), rollouts.lengths)
        return self.recipe.advantages(rollouts, values)[counted]

    def _targeted(self, rollouts: Rollouts) -> NDArray[np.bool_]:
        """bool [n]: rollouts that get returns and advantages."""
        if self.recipe.truncated == "drop" and rollouts.truncated is not None:
            return ~rollouts.truncated
        return np.ones(len(rollouts), dtype=np.bool_)


def written_again(
    shard: Shard,
    target: Path,
    new: NewColumns,
    renames: dict[str, str],
    filled: Iterator[Filled],
    stop: StopRequest,
) -> Iterator[int]:
    """Write a shard again with new columns; see `copied` for what else it does, yields and raises.

    A new column stands under its canonical name, or the name that --column gives it; a column of that name is replaced.

    Args:
        shard: the file.
        target: where to write it.
        new: what is written.
        renames: canonical name -> column, from --column.
        filled: the new columns, in the file's order.
        stop: looked at between pieces.
    """
    schema = schema_of(shard)
    columns = understand(schema, shard, renames=renames, labels=(), needs=Needs(returns=False, values=False))
    names: dict[str, str] = {name: renames.get(name, name) for name in new.written}
    written = with_columns(schema, list(names.values()))
    rows = FilledRows(filled)

    def change(first_row: int, batch: pa.RecordBatch) -> pa.RecordBatch:
        return filled_in(batch, written, names, columns, first_row, rows.upto(first_row + batch.num_rows))

    return copied(shard, target, written, change, stop)
