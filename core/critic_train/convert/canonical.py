"""Records of any format as canonical tables: checked by the code that reads shards, padding removed."""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.convert.raw_records import Records
from critic_train.data.alignment import ragged
from critic_train.data.bad_input import BadRow, BadRows
from critic_train.data.column_types import list_item_type
from critic_train.data.masks import MaskChoice
from critic_train.data.row_checks import CheckedBatch, RowLimits, check_batch
from critic_train.data.schema import ALIASES, Columns, Needs, resolve_schema
from critic_train.data.shards import Shard
from critic_train.data.writing import rollout_table
from critic_train.errors import DataError
from critic_train.rollouts import offsets_from_lengths, ragged_take

TOKEN_NAMES = ("values", "returns", "rewards")
SHIFTABLE = ("loss_mask", "loss_masks", "mask", "masks", "token_loss_mask")
"""Names of masks that some trainers store shifted by one, over the tokens that predict."""
OTHERS = ("tool", "observation", "obs", "env", "environment", "user")
NOT_OF_THE_POLICY = frozenset(f"{who}_{mask}" for who in OTHERS for mask in ("mask", "masks"))
"""Names of masks of tokens that the policy did not write."""
SEEN = Needs(returns="where there", values=False, rewards="where there", truncated="where there")


@dataclass(slots=True)
class _Shift:
    """What tells whether a mask is shifted by one: rollouts, those cut before the last token, and the ids there."""

    rollouts: int = 0
    cut: int = 0
    first_ids: set[int] = field(default_factory=set)
    last_ids: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Canonicaliser:
    """Makes canonical tables of one source's records: checked by the code that reads shards, padding removed.

    Args:
        name: the source, for messages.
        renames: canonical name -> the source's column, from --column.
        unit: what a record's number counts in the source: "row", "line", ...
        group_by: --group-by.
        understood: prompt, response, reward, ... -> what was read as that, in words, where the columns do not tell.

    Attributes:
        bad_rows: records that were left out.
        notes: sentences on columns that were left out or taken under another name.
    """

    name: str
    renames: dict[str, str]
    unit: str = "row"
    group_by: str | None = None
    understood: dict[str, str] = field(default_factory=dict)
    bad_rows: BadRows = field(default_factory=BadRows)
    notes: dict[str, None] = field(default_factory=dict)
    _columns: dict[str, Columns] = field(default_factory=dict)
    _masks: dict[tuple[str, ...], MaskChoice] = field(default_factory=dict)
    _shift: "_Shift" = field(default_factory=lambda: _Shift())

    def table(self, records: Records) -> pa.Table | None:
        """The good rollouts among some records; None where there is none.

        Raises:
            DataError: a column is missing or of the wrong type.
        """
        self.notes.update(dict.fromkeys(records.notes))
        for bad in records.bad:
            self._count(bad.reason, bad.row, bad.column, bad.actual, bad.expected)
        batch = records.batch
        if not batch.num_rows:
            return None
        columns = self._resolve(batch.schema)
        has_rewards = columns.rewards or columns.reward
        checked = check_batch(batch, columns, RowLimits(), "yes" if has_rewards else "no")
        self.notes.update(dict.fromkeys(checked.notes))
        self._masks.setdefault(columns.masks, MaskChoice(file=self.name, masks=columns.masks)).add(checked.narrowest)
        self._check_shift(columns, checked)
        self._check_others(batch, checked)
        for row, (reason, column, actual, expected) in sorted(checked.errors.by_row.items()):
            self._count(reason, int(records.rows[row]), column, actual, expected)
        good = np.flatnonzero(~checked.errors.bad)
        if not len(good):
            return None
        return self._table(batch, columns, checked, good)

    def _resolve(self, schema: pa.Schema) -> Columns:
        key = schema.to_string()
        if key not in self._columns:
            shard = Shard(path=self.name, name=self.name, num_rows=1, num_row_groups=1, size_bytes=0, footer_digest="")
            seen = resolve_schema(schema, shard, renames=self.renames, labels=(), needs=SEEN)
            has_rewards = bool(seen.rewards or seen.reward)
            needs = Needs(
                returns=seen.returns is not None or not has_rewards,
                values=False,
                rewards="where there" if seen.returns is not None else "yes",
                truncated=seen.truncated is not None,
            )
            columns = resolve_schema(schema, shard, renames=self.renames, labels=(), needs=needs)
            if self.group_by == "prompt" and columns.uid is not None:
                columns = replace(columns, uid=None)
            self._understand(columns)
            self._columns[key] = columns
        return self._columns[key]

    def _understand(self, columns: Columns) -> None:
        """Remember which column became what."""
        parts = {"prompt": f"`{columns.prompts}`", "response": f"`{columns.responses}`"}
        if columns.input_ids is not None:
            parts["prompt"] = f"`{columns.input_ids}` before the response"
            parts["response"] = f"what the mask marks in `{columns.input_ids}`"
        paid = columns.rewards or columns.reward
        parts["reward"] = f"`{paid}`" if paid else "not there"
        parts |= {name: f"`{getattr(columns, name)}`" for name in ("returns", "values") if getattr(columns, name)}
        parts["mask"] = f"`{columns.response_mask}`" if columns.response_mask else f"all of `{columns.responses}`"
        parts["group"] = f"`{columns.uid}`" if columns.uid else "the prompt"
        self.understood = {**parts, **self.understood}

    def _check_shift(self, columns: Columns, checked: CheckedBatch) -> None:
        """Count the rollouts whose mask looks as if it were shifted by one, over the tokens that predict.

        Then it begins on the prompt's last token, the same in all rollouts of a template, and leaves out the last
        token of all, the one that ends a text.
        """
        if columns.input_ids is None or columns.masks[0] not in SHIFTABLE or columns.masks[0] in self.renames.values():
            return
        offsets = offsets_from_lengths(checked.lengths)
        ones = np.flatnonzero(checked.response_mask)
        bounds = np.searchsorted(ones, offsets)
        good = np.flatnonzero(~checked.errors.bad & (bounds[1:] > bounds[:-1]))
        first, last = ones[bounds[:-1][good]], ones[bounds[1:][good] - 1]
        ends = offsets[1:][good]
        self._shift.rollouts += len(good)
        self._shift.cut += int((last == ends - 2).sum())
        self._shift.first_ids.update(checked.input_ids[first].tolist())
        self._shift.last_ids.update(checked.input_ids[ends - 1].tolist())

    def _check_others(self, batch: pa.RecordBatch, checked: CheckedBatch) -> None:
        """Raise where a mask of what others wrote marks tokens that count as the policy's."""
        for name in NOT_OF_THE_POLICY & set(batch.schema.names):
            others = ragged(batch.column(name)) if list_item_type(batch.schema.field(name).type) is not None else None
            if others is None or not np.array_equal(others.lengths, checked.lengths):
                continue
            if (checked.response_mask & (others.flat == 1)).any():
                raise DataError(
                    f"{self.name}: `{name}` marks tokens that count as the policy's",
                    hint="--column response_mask=NAME takes the mask of what the policy wrote",
                )

    def sentence(self) -> str:
        """Which field became what."""
        return f"{self.name}: " + ", ".join(f"{part} = {text}" for part, text in self.understood.items())

    def finish(self) -> None:
        """Look at what only all records together tell.

        Raises:
            DataError: the mask may be shifted by one.
        """
        for choice in self._masks.values():
            self.notes.update(dict.fromkeys(choice.sentences()))
            if choice.chosen is not None and len(choice.masks) > 1:
                self.understood["mask"] = f"`{choice.chosen}`"
        shift = self._shift
        if shift.rollouts > 1 and shift.cut == shift.rollouts and len(shift.first_ids) == len(shift.last_ids) == 1:
            name = next(iter(self._masks))[0]
            raise DataError(
                f"{self.name}: `{name}` may be shifted by one: in every rollout it begins on token "
                f"{next(iter(shift.first_ids))} and leaves out the last token, {next(iter(shift.last_ids))}",
                hint=f"--column response_mask={name} reads it as it is; if it marks the tokens that predict, shift it "
                "by one before",
            )

    def _table(
        self, batch: pa.RecordBatch, columns: Columns, checked: CheckedBatch, good: NDArray[np.int64]
    ) -> pa.Table:
        """The canonical columns of the good rows, and all others with one entry a rollout."""
        positions, offsets = ragged_take(offsets_from_lengths(checked.lengths), good)
        tokens = {"input_ids": checked.input_ids[positions], "response_mask": checked.response_mask[positions]}
        source_names = {"values": columns.values, "returns": columns.returns, "rewards": columns.rewards}
        for name in TOKEN_NAMES:
            column = getattr(checked, name)
            if source_names[name] is not None and column is not None:
                tokens[name] = column[positions]
        single: dict[str, pa.Array] = {}
        if columns.uid is not None:
            single["uid"] = pc.cast(batch.column(columns.uid), pa.string())
        single |= self._carried(batch, columns)
        if columns.reward is not None:
            single["reward"] = pc.cast(batch.column(columns.reward), pa.float64())
        if checked.truncated is not None:
            single["truncated"] = pa.array(checked.truncated)
        taken = {name: column.take(pa.array(good)) for name, column in single.items()}
        return rollout_table(offsets, tokens, taken)

    def _carried(self, batch: pa.RecordBatch, columns: Columns) -> dict[str, pa.Array]:
        """Columns with one entry a rollout that are not canonical, under their own names."""
        read = {*columns.names(), "attention_mask"}
        carried: dict[str, pa.Array] = {}
        for field_, column in zip(batch.schema, batch.columns, strict=True):
            if field_.name in read or field_.name in ALIASES:
                continue
            if pa.types.is_nested(field_.type) or pa.types.is_null(field_.type):
                if not pa.types.is_null(field_.type):
                    self.notes.setdefault(f"`{field_.name}` is left out: a critic needs none of it")
            else:
                carried[field_.name] = column.dictionary_decode() if pa.types.is_dictionary(field_.type) else column
        return carried

    def _count(self, reason: str, row: int, column: str, actual: str, expected: str) -> None:
        bad = BadRow(file=self.name, unit=self.unit, row=row, column=column, actual=actual, expected=expected)
        self.bad_rows.add(reason, bad)


def groups_together(table: pa.Table) -> pa.Table:
    """The rollouts of a prompt group next to each other, groups in the order in which they first appear.

    A group is a uid; without that column, a prompt.
    """
    keys = table.column("uid") if "uid" in table.column_names else pa.chunked_array([_prompts(table)])
    # A rollout without a uid is a group of its own.
    keys = pc.if_else(pc.is_valid(keys), keys, pa.array([f"\0{row}" for row in range(len(keys))]))
    encoded = keys.combine_chunks().dictionary_encode()
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
