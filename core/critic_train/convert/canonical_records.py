"""Raw records as canonical columns: understood, aligned, checked by the code that reads shards, padding gone."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.convert.records import Records
from critic_train.data.bad_input import BadRow, BadRows
from critic_train.data.row_checks import CheckedBatch, RowLimits, check_batch
from critic_train.data.schema import ALIASES, Columns, Needs, resolve_schema
from critic_train.data.shards import Shard
from critic_train.data.writing import rollout_table
from critic_train.rollouts import offsets_from_lengths, ragged_take

TOKEN_NAMES = ("values", "returns", "rewards")


@dataclass(slots=True)
class Canonicaliser:
    """Makes canonical tables of one source's records.

    Args:
        name: the source, for messages.
        renames: canonical name -> the source's column, from --column.
        unit: what a record's number counts in the source: "row", "line", ...

    Attributes:
        bad_rows: records that were left out.
        notes: what was understood or left out without being said, in sentences.
    """

    name: str
    renames: dict[str, str]
    unit: str = "row"
    bad_rows: BadRows = field(default_factory=BadRows)
    notes: dict[str, None] = field(default_factory=dict)
    _understood: dict[str, Columns] = field(default_factory=dict)

    def table(self, records: Records) -> pa.Table | None:
        """The good rollouts among some records; None where there is none.

        Raises:
            DataError: a column is missing or of the wrong type.
        """
        self.notes.update(dict.fromkeys(records.notes))
        for bad in records.bad:
            self._count(bad.reason, bad.row, bad.column, bad.found, bad.expected)
        batch = records.batch
        if not batch.num_rows:
            return None
        columns = self._understand(batch.schema)
        paid = columns.rewards or columns.reward
        checked = check_batch(batch, columns, RowLimits(), "yes" if paid else "no")
        for row, (reason, column, found, expected) in sorted(checked.faults.found.items()):
            self._count(reason, int(records.rows[row]), column, found, expected)
        good = np.flatnonzero(~checked.faults.bad)
        if not len(good):
            return None
        return self._table(batch, columns, checked, good)

    def _understand(self, schema: pa.Schema) -> Columns:
        key = schema.to_string()
        if key not in self._understood:
            there = set(schema.names) | set(self.renames)
            shard = Shard(path=self.name, name=self.name, num_rows=1, num_row_groups=1, size_bytes=0, footer_digest="")
            has = {name: bool(there & {name, *ALIASES[name]}) for name in ("returns", "truncated")}
            paid = bool(there & {"rewards", "reward", *ALIASES["rewards"], *ALIASES["reward"]})
            needs = Needs(
                returns=has["returns"] or not paid,
                values=False,
                rewards="where there" if has["returns"] else "yes",
                truncated=has["truncated"],
            )
            columns = resolve_schema(schema, shard, renames=self.renames, labels=(), needs=needs)
            self.notes.update(dict.fromkeys(columns.notices()))
            self._understood[key] = columns
        return self._understood[key]

    def _table(
        self, batch: pa.RecordBatch, columns: Columns, checked: CheckedBatch, good: NDArray[np.int64]
    ) -> pa.Table:
        """The canonical columns of the good rows, and what else there is with one entry a rollout."""
        places, offsets = ragged_take(offsets_from_lengths(checked.lengths), good)
        tokens = {"input_ids": checked.input_ids[places], "response_mask": checked.response_mask[places]}
        wanted = {"values": columns.values, "returns": columns.returns, "rewards": columns.rewards}
        for name in TOKEN_NAMES:
            column = getattr(checked, name)
            if wanted[name] is not None and column is not None:
                tokens[name] = column[places]
        single: dict[str, pa.Array] = {}
        if columns.uid is not None:
            single["uid"] = pc.cast(batch.column(columns.uid), pa.string())
        single |= self._carried(batch, columns)
        if columns.reward is not None:
            single["reward"] = pc.cast(batch.column(columns.reward), pa.float64())
        if checked.truncated is not None:
            single["truncated"] = pa.array(checked.truncated)
        kept = {name: column.take(pa.array(good)) for name, column in single.items()}
        return rollout_table(offsets, tokens, kept)

    def _carried(self, batch: pa.RecordBatch, columns: Columns) -> dict[str, pa.Array]:
        """Columns with one entry a rollout that are none of the canonical ones, under their own names."""
        read = {*columns.names(), "attention_mask"}
        carried: dict[str, pa.Array] = {}
        for field_, column in zip(batch.schema, batch.columns, strict=True):
            if field_.name in read or field_.name in ALIASES:
                continue
            if pa.types.is_nested(field_.type) or pa.types.is_null(field_.type):
                if not pa.types.is_null(field_.type):
                    self.notes.setdefault(f"`{field_.name}` is left out: a critic needs none of it")
            else:
                carried[field_.name] = column
        return carried

    def _count(self, reason: str, row: int, column: str, found: str, expected: str) -> None:
        where = BadRow(file=self.name, unit=self.unit, row=row, column=column, found=found, expected=expected)
        self.bad_rows.add(reason, where)


def groups_together(table: pa.Table) -> pa.Table:
    """The rollouts of a prompt group next to each other, groups in the order in which they first appear.

    A group is a uid; without that column, a prompt.
    """
    keys = table.column("uid") if "uid" in table.column_names else pa.chunked_array([_prompts(table)])
    own = pc.if_else(pc.is_valid(keys), keys, pa.array([f"\0{row}" for row in range(len(keys))]))
    encoded = own.combine_chunks().dictionary_encode()
    order = np.argsort(encoded.indices.to_numpy(), kind="stable")
    return table if (np.diff(order) == 1).all() else table.take(pa.array(order))


def _prompts(table: pa.Table) -> pa.Array:
    """A text for each prompt: the tokens before the first response token."""
    ids, mask = table.column("input_ids").combine_chunks(), table.column("response_mask").combine_chunks()
    flat, marked = ids.flatten().to_numpy(), np.flatnonzero(mask.flatten().to_numpy(zero_copy_only=False))
    offsets = np.asarray(ids.offsets.to_numpy(), dtype=np.int64)
    offsets = offsets - offsets[0]
    ends = marked[np.searchsorted(marked, offsets[:-1])]
    spans = zip(offsets[:-1].tolist(), ends.tolist(), strict=True)
    return pa.array([hashlib.blake2b(flat[start:end].tobytes(), digest_size=16).hexdigest() for start, end in spans])
