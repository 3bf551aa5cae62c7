"""Read rollouts from Parquet shards: a stream of checked batches, in file order, in bounded memory."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from zlib import crc32

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.bad_input import ROWS_SHOWN, BadFile, BadFiles, BadRow, BadRows, RowErrors
from critic_train.data.decoding import MOST_TOKENS, Piece, damaged, pieces
from critic_train.data.groups import PromptGroups, grouping_renames, require_uid
from critic_train.data.labels import label_column, label_kind
from critic_train.data.masks import MaskChoice
from critic_train.data.parquet_footer import FooterError, RowGroup, read_footer
from critic_train.data.row_checks import CheckedBatch, RowLimits, check_batch
from critic_train.data.schema import Columns, Needs, check_canonical, resolve_schema
from critic_train.data.shards import Shard
from critic_train.data.stores import open_file
from critic_train.errors import DataError
from critic_train.rollouts import Rollouts, offsets_from_lengths
from critic_train.settings import OnBadFile, OnBadRows
from critic_train.stopping import StopRequest


class DuplicateCounter:
    """Counts rollouts whose tokens, mask and returns are those of an earlier one. Keeps 8 bytes a rollout.

    They are reported and not refused: a dump that was written twice weighs twice, but a policy may also repeat itself.
    """

    def __init__(self) -> None:
        self._keys: list[NDArray[np.uint64]] = []

    def add(self, rollouts: Rollouts) -> None:
        """Take in some more rollouts."""
        ids, mask, returns = (
            memoryview(np.ascontiguousarray(column).view(np.uint8))  # type: ignore[arg-type]
            for column in (rollouts.input_ids, rollouts.response_mask, rollouts.returns)
        )
        bounds = rollouts.offsets.tolist()
        keys = np.empty(len(rollouts), dtype=np.uint64)
        for row, (start, stop) in enumerate(pairwise(bounds)):
            tokens = int.from_bytes(blake2b(ids[4 * start : 4 * stop], digest_size=8).digest(), "little")
            keys[row] = tokens ^ crc32(mask[start:stop]) << 32 ^ crc32(returns[4 * start : 4 * stop])
        self._keys.append(keys)

    @property
    def count(self) -> int:
        """Rollouts that are copies of one before them."""
        keys = np.concatenate([np.zeros(0, dtype=np.uint64), *self._keys])
        return len(keys) - len(np.unique(keys))

    def sentence(self) -> str:
        """A notice about them; an empty string where there are none."""
        count = self.count
        if not count:
            return ""
        rollouts = "1 rollout is an exact copy" if count == 1 else f"{count:,} rollouts are exact copies"
        return f"{rollouts} of others (tokens, mask and returns): each is counted as often as it appears"


__all__ = ["Needs", "RolloutReader", "RowLimits"]


class RolloutReader:
    """Rollouts of some shards. Every iteration starts from the first row.

    A file is used entirely or not at all, since damage in one part makes the others suspect. With on_bad_file "skip"
    every file is therefore decoded to its end, once, before its first row is given.

    Args:
        shards: from `find_shards`.
        renames: canonical name -> column, from --column.
        on_bad_rows: "fail" raises, after all rows were read, a DataError that counts every bad row; "skip" leaves
            them out, and raises only where no good one is left.
        on_bad_file: "fail" raises, after all other files were read, a DataError that names every bad file; "skip"
            leaves them out, and raises only where no good one is left.
        bad_files: those from `find_shards`; more are added here.
        limits: what the model can take.
        labels: per-rollout columns to carry in `Rollouts.labels`.
        needs: what is read beside token ids and masks. Columns that are read but not needed are used only if every
            shard has them.
        drop_truncated: leave truncated rollouts out, unchecked.
        group_by: "uid", "prompt", or a column; None goes by the uid where it is one (`PromptGroups`).
        listed_bad_rows: how many bad rows are listed one by one.
        stop: checked while a file is tried with "skip"; iteration then raises Stopped.

    Attributes:
        bad_rows: those of the iteration under way or just ended.
        shared_columns: which of returns, values, rewards and truncated every file of that iteration has.
        first_columns: the columns of the first of these files.
        bad_files: all bad files so far.
        files_read: name and rows of each file of that iteration, in order; `Rollouts.row` counts over them.
        truncated_left_out: truncated rollouts left out by the iteration under way or just ended.
        notices: how columns were interpreted, in sentences.
        groups: how rollouts were grouped.

    Raises:
        DataError: from iteration: files or rows are bad.
    """

    def __init__(
        self,
        shards: list[Shard],
        *,
        renames: dict[str, str] | None = None,
        on_bad_rows: OnBadRows = "fail",
        on_bad_file: OnBadFile = "fail",
        bad_files: BadFiles | None = None,
        limits: RowLimits | None = None,
        labels: list[str] | None = None,
        needs: Needs | None = None,
        drop_truncated: bool = False,
        group_by: str | None = None,
        listed_bad_rows: int = ROWS_SHOWN,
        stop: StopRequest | None = None,
    ) -> None:
        self.shards = shards
        self.bad_rows = BadRows(listed_bad_rows)
        self._listed_bad_rows = listed_bad_rows
        self.shared_columns: frozenset[str] = frozenset()
        self.first_columns: Columns | None = None
        self.bad_files = BadFiles() if bad_files is None else bad_files
        self._group_by = group_by
        self._renames = grouping_renames(renames or {}, group_by)
        self._on_bad_rows = on_bad_rows
        self._on_bad_file = on_bad_file
        self._limits = limits or RowLimits()
        self._labels = tuple(labels or ())
        self._needs = needs or Needs()
        self._drop_truncated = drop_truncated
        self.truncated_left_out = 0
        self._stop = stop or StopRequest()
        self.groups = PromptGroups(group_by)
        self.files_read: list[tuple[str, int]] = []
        self._tried: set[str] = set()
        self._copies, self._read_once = DuplicateCounter(), False
        self._notices: dict[str, None] = {}

    @property
    def notices(self) -> list[str]:
        """Sentences, in the order they came up."""
        return list(self._notices)

    def __iter__(self) -> Iterator[Rollouts]:
        check_canonical(self._renames)
        self.bad_rows = BadRows(self._listed_bad_rows)
        self.files_read = []
        self.truncated_left_out = 0
        row = good = 0
        plans = self._plans()
        shared = self.shared_columns = self._shared_columns(plans)
        self.first_columns = plans[0].columns if plans else None
        groups = self.groups = PromptGroups(self._group_by)
        groups.survey(plan.uids() for plan in plans)
        text_labels = _text_labels(plans)
        for plan in plans:
            if not self._is_readable(plan):
                continue
            self.files_read.append((plan.shard.name, plan.shard.num_rows))
            masks = MaskChoice(file=plan.shard.name, masks=plan.columns.masks)
            try:
                for piece in plan.pieces():
                    checked = self._checked(piece, plan)
                    masks.add(checked.narrowest)
                    usable = self._usable(checked)
                    rollouts = _rollouts(piece.rows, plan.columns, checked, usable, row, shared, text_labels, groups)
                    row += piece.rows.num_rows
                    if len(rollouts):
                        good += len(rollouts)
                        if not self._read_once:
                            self._copies.add(rollouts)
                        yield rollouts
                self._notices.update(dict.fromkeys(masks.sentences()))
            except DataError as error:
                self._add_bad_file(plan.shard, error)
                # With "skip" the file was read to its end before: it has changed since, and rows of it are in use.
                if self._on_bad_file == "skip":
                    raise self.bad_files.error() from error
        self._notices.update(dict.fromkeys(groups.sentences()))
        if not self._read_once:
            self._read_once = True
            self._notices.update(dict.fromkeys(filter(None, [self._copies.sentence()])))
        self._check_left_out(any(plan.shard.name not in self.bad_files for plan in plans), good)

    def _checked(self, piece: Piece, plan: "_Plan") -> CheckedBatch:
        columns, rewards = plan.columns, self._needs.rewards
        made_of_rewards = self._needs.returns == "where there" and columns.returns is None
        if made_of_rewards and rewards == "where there" and (columns.rewards or columns.reward):
            rewards = "yes"  # a bad one is then as bad as a bad return
        checked = check_batch(
            piece.rows,
            columns,
            self._limits,
            rewards,
            drop_truncated=self._drop_truncated,
            errors=_oversized_rows(piece),
        )
        self._record(plan.shard, piece.row_group, piece.first_row, checked)
        return checked

    def _usable(self, checked: CheckedBatch) -> NDArray[np.bool_]:
        """bool [rows]: neither bad nor truncated and to be dropped; counts the latter."""
        usable = ~checked.errors.bad
        if self._drop_truncated and checked.truncated is not None:
            self.truncated_left_out += int((usable & checked.truncated).sum())
            usable &= ~checked.truncated
        return usable

    def _check_left_out(self, some_file: bool, good: int) -> None:
        """Raise where bad files or rows may not be left out, in one error.

        Args:
            some_file: whether any file could be read.
            good: number of good rows.
        """
        errors = []
        if self.bad_files and (self._on_bad_file == "fail" or not some_file):
            errors.append(self.bad_files.error(all_of_them=not some_file))
        if self.bad_rows.count and (self._on_bad_rows == "fail" or not good):
            errors.append(self.bad_rows.error(all_of_them=not good))
        if not good and self.truncated_left_out and not errors:
            raise DataError(
                f"all {self.truncated_left_out} rollouts were cut, and --truncated drop leaves those out",
                hint="--truncated terminal or bootstrap keeps them",
            )
        if errors:
            raise DataError(
                "\n".join(error.message for error in errors), hint="\n".join(error.hint for error in errors)
            )

    def _plans(self) -> "list[_Plan]":
        """How each file is read; files whose schema cannot be resolved become bad files."""
        plans = []
        # A shard without rows is passed over: its columns often have no type.
        empty = [shard.name for shard in self.shards if not shard.num_rows]
        if empty:
            what = f"{empty[0]} holds" if len(empty) == 1 else f"{len(empty)} files hold"
            self._notices.setdefault(f"{what} no rows")
        for shard in self.shards:
            if shard.num_rows and shard.name not in self.bad_files:
                try:
                    plans.append(self._plan(shard))
                except DataError as error:
                    self._add_bad_file(shard, error)
        return plans

    def _is_readable(self, plan: "_Plan") -> bool:
        """Whether a file can be read; with "skip" all of it is decoded once to find out."""
        if self._on_bad_file == "fail" or plan.shard.name in self._tried:
            return True
        try:
            for _ in plan.pieces():
                self._stop.check()
        except DataError as error:
            self._add_bad_file(plan.shard, error)
            return False
        self._tried.add(plan.shard.name)
        return True

    def _add_bad_file(self, shard: Shard, error: DataError) -> None:
        self.bad_files.add(BadFile.of(shard.name, error, shard.num_rows))

    def _plan(self, shard: Shard) -> "_Plan":
        try:
            with open_file(shard.path) as file:
                footer = read_footer(file)
            schema = footer.metadata.schema.to_arrow_schema()
            columns = resolve_schema(schema, shard, renames=self._renames, labels=self._labels, needs=self._needs)
            groups = footer.row_groups() if self._labels else []
            nullable = frozenset(name for name in self._labels if _may_be_null(groups, name))
        except FooterError as error:
            raise error.of(shard.name) from error
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise damaged(shard, error) from error
        require_uid(shard.name, columns.uid, self._group_by)
        self._notices.update(dict.fromkeys(columns.notices()))
        kinds = {name: label_kind(schema.field(name).type) for name in self._labels}
        text_uid = columns.uid is not None and label_kind(schema.field(columns.uid).type) == "text"
        return _Plan(shard=shard, columns=columns, text_uid=text_uid, label_kinds=kinds, nullable_labels=nullable)

    def _shared_columns(self, plans: list["_Plan"]) -> frozenset[str]:
        """Which of these columns every shard has."""
        without = {
            "returns": [plan.shard.name for plan in plans if plan.columns.returns is None],
            "truncated": [plan.shard.name for plan in plans if plan.columns.truncated is None],
            "values": [plan.shard.name for plan in plans if plan.columns.values is None],
            "rewards": [plan.shard.name for plan in plans if not (plan.columns.rewards or plan.columns.reward)],
        }
        for name, files in without.items():
            if files and len(files) < len(plans):
                self._notices.setdefault(
                    f"{len(files)} of {len(plans)} files have no {name} ({files[0]} first): none are used"
                )
        return frozenset(name for name, files in without.items() if not files)

    def _record(self, shard: Shard, row_group: int, first_row: int, checked: CheckedBatch) -> None:
        self._notices.update(dict.fromkeys(checked.notes))
        for row, (reason, column, actual, expected) in sorted(checked.errors.by_row.items()):
            self.bad_rows.add(
                reason,
                BadRow(
                    file=shard.name,
                    row_group=row_group,
                    row=first_row + row,
                    column=column,
                    actual=actual,
                    expected=expected,
                ),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one shard is read."""

    shard: Shard
    columns: Columns
    text_uid: bool
    label_kinds: dict[str, str]
    nullable_labels: frozenset[str]

    def uids(self) -> Iterator[pa.Array]:
        """The uid column alone, where there is one; it ends early where the file is damaged, as reading it tells."""
        name = self.columns.uid
        with suppress(DataError):
            for piece in pieces(self.shard, [name], [], [name] if self.text_uid else []) if name else ():
                yield piece.rows.column(0)

    def pieces(self) -> Iterator[Piece]:
        """The rows, decoded."""
        columns = self.columns
        ids = [name for name in (columns.input_ids, columns.prompts, columns.responses) if name is not None]
        texts = [name for name, kind in self.label_kinds.items() if kind == "text"]
        texts += [columns.uid] if columns.uid is not None and self.text_uid else []
        return pieces(self.shard, columns.names(), ids, texts)


def _oversized_rows(piece: Piece) -> RowErrors:
    """The oversized rows of a piece, marked as bad."""
    errors = RowErrors(piece.rows.num_rows)
    for row, (column, elements) in piece.oversized.items():
        reason, expected = "lists of absurd length", f"at most {MOST_TOKENS:,}"
        errors.bad[row] = True
        errors.by_row[row] = (reason, column, f"{elements:,} elements", expected)
    return errors


def _text_labels(plans: list[_Plan]) -> frozenset[str]:
    """Labels that must be text throughout: somewhere an entry is missing, or files differ in type."""
    names = {name for plan in plans for name in plan.label_kinds}
    return frozenset(
        name
        for name in names
        if any(name in plan.nullable_labels for plan in plans) or len({plan.label_kinds[name] for plan in plans}) > 1
    )


def _may_be_null(groups: list[RowGroup], name: str) -> bool:
    """Whether a column without children may hold nulls, by the footer's statistics."""
    chunks = [chunk for group in groups for chunk in group.chunks if chunk.path == name]
    return not chunks or any(chunk.nulls is None or chunk.nulls for chunk in chunks)


def _rollouts(
    batch: pa.RecordBatch,
    columns: Columns,
    checked: CheckedBatch,
    usable: NDArray[np.bool_],
    first_row: int,
    shared_columns: frozenset[str],
    text_labels: frozenset[str],
    groups: PromptGroups,
) -> Rollouts:
    """The rows of a batch that can be used."""
    n = batch.num_rows
    rollouts = Rollouts(
        input_ids=checked.input_ids,
        offsets=offsets_from_lengths(checked.lengths),
        response_mask=checked.response_mask,
        returns=checked.returns,
        values=checked.values if "values" in shared_columns else None,
        rewards=checked.rewards if "rewards" in shared_columns else None,
        truncated=checked.truncated if "truncated" in shared_columns else None,
        group=np.zeros(n, dtype=np.int64),
        row=np.arange(first_row, first_row + n, dtype=np.int64),
        labels={name: label_column(batch.column(name), as_text=name in text_labels) for name in columns.labels},
    )
    good = np.flatnonzero(usable)
    if len(good) < n:
        rollouts = rollouts.take(good)
    groups.assign(rollouts, None if columns.uid is None else batch.column(columns.uid).take(pa.array(good)))
    return rollouts
