"""Which column of a shard is which: canonical names, their aliases, and the types they must have."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, NoReturn

import pyarrow as pa

from critic_train.data.column_types import is_nested, is_number, list_item_type
from critic_train.data.shards import Shard, convert_command
from critic_train.errors import DataError

ALIASES: dict[str, tuple[str, ...]] = {
    "input_ids": ("tokens", "token_ids", "ids", "sequences"),
    "prompts": ("prompt_ids", "prompt_token_ids"),
    "responses": ("response_ids", "response_token_ids", "completion_ids"),
    "response_mask": (
        "mask",
        "masks",
        "loss_mask",
        "loss_masks",
        "action_mask",
        "action_masks",
        "response_masks",
        "token_loss_mask",
        "completion_mask",
        "completion_masks",
        "assistant_mask",
        "assistant_masks",
        "info_mask",
        "labels",
    ),
    "values": ("old_values", "value", "vpreds", "critic_values", "v_old"),
    "returns": ("return", "value_targets", "targets", "returns_to_go"),
    "rewards": ("token_level_rewards", "reward_tokens"),
    "reward": ("rewards", "score", "reward_score"),
    "truncated": ("is_truncated",),
    "uid": ("group_id", "prompt_id", "group_index"),
    "attention_mask": (),
}
"""Canonical name -> names that mean the same elsewhere, most specific first."""

MAY_BE_TOKEN_IDS = frozenset({"targets"})
"""Aliases that language models give to token ids as well: read as numbers only where they are floats."""

INTEGERS, NUMBERS, SINGLE = "a list of integers", "a list of numbers or booleans", "one value a rollout"
NUMBER, TRUTH = "one number a rollout", "one boolean a rollout"
EXPECTED = {
    "input_ids": INTEGERS,
    "prompts": INTEGERS,
    "responses": INTEGERS,
    "uid": SINGLE,
    "reward": NUMBER,
    "truncated": TRUTH,
}
"""Canonical name -> what its column must hold; NUMBERS for all others."""

MEANING = {
    "input_ids": "the token ids; or prompts and responses, the token ids of each",
    "response_mask": "1 on the tokens the policy chose",
    "returns": "the regression target of every response token",
    "values": "the values stored at rollout time",
    "rewards": "what each response token earned; or reward, one number a rollout",
    "truncated": "whether each rollout was cut before it ended by itself",
}

OVERRULED = {"prompts": ("input_ids",), "responses": ("input_ids",), "reward": ("rewards",)}
"""Canonical name -> those that are read in its place where they are there."""

Need = Literal["no", "where there", "yes"]
"""Whether a column is read: never, where a shard has it, or always."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a command needs beside token ids and masks.

    Returns that are not needed are not read, and make no row bad. Rewards that are read only "where there" make no row
    bad either: a batch with bad ones has none.
    """

    returns: bool | Literal["where there"] = True
    values: bool = True
    rewards: Need = "no"
    truncated: bool | Literal["where there"] = False
    advice: Mapping[str, str] = field(default_factory=dict)
    """Canonical name -> what the command can do where it is needed and missing."""
    every_rename: bool = False
    """Whether a rename of a column that is not read is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of one shard: canonical name -> the shard's name, None where it has none.

    Either `input_ids` is set, or `prompts` and `responses` are. `narrowing` are further masks: a token is the policy's
    where all masks have a 1.
    """

    input_ids: str | None
    prompts: str | None
    responses: str | None
    response_mask: str | None
    attention_mask: str | None
    values: str | None
    returns: str | None
    rewards: str | None
    reward: str | None
    truncated: str | None
    uid: str | None
    labels: tuple[str, ...]
    narrowing: tuple[str, ...] = ()

    @property
    def masks(self) -> tuple[str, ...]:
        """All masks of the response, the one that the shard names most plainly first."""
        return () if self.response_mask is None else (self.response_mask, *self.narrowing)

    def names(self) -> list[str]:
        """The shard's columns that are read, each once."""
        columns = (
            self.input_ids,
            self.prompts,
            self.responses,
            self.response_mask,
            self.attention_mask,
            self.values,
            self.returns,
            self.rewards,
            self.reward,
            self.truncated,
            self.uid,
        )
        named = [name for name in columns if name is not None]
        return list(dict.fromkeys([*named, *self.narrowing, *self.labels]))

    def as_dict(self) -> dict[str, str]:
        """Canonical name -> the shard's column, for those it has; labels left out."""
        several = ("labels", "narrowing")
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in several}
        return {name: column for name, column in named.items() if column is not None}

    def notices(self) -> list[str]:
        """The aliases that were used, in sentences."""
        sentences = [
            f"`{getattr(self, name)}` is read as {name}"
            for name in ("input_ids", "response_mask", "values", "returns", "rewards", "reward", "truncated", "uid")
            if getattr(self, name) not in (None, name) and not (name == "response_mask" and self.narrowing)
        ]
        if self.input_ids is None:
            sentences.append(f"`{self.prompts}` and `{self.responses}` together are read as input_ids")
            if self.response_mask is None:
                sentences.append(f"there is no response_mask: all of `{self.responses}` counts as response")
        return sentences


def resolve_schema(
    schema: pa.Schema, shard: Shard, *, renames: dict[str, str], labels: tuple[str, ...], needs: Needs
) -> Columns:
    """Find the canonical columns in a shard's schema.

    A rename comes before the canonical name, and that before aliases. An alias is used only where its type fits: a
    column `ids` or `mask` of texts is something else, and so are `prompts` and `responses` of texts.

    Args:
        schema: Arrow schema of the shard.
        shard: for the messages.
        renames: canonical name -> the shard's column.
        labels: per-rollout columns to carry along.
        needs: what must be there.

    Raises:
        DataError: a required column is missing, ambiguous, there twice or of the wrong type; or a rename would have no
            effect.
    """
    check_canonical(renames)
    finder = _SchemaResolver(schema=schema, shard=shard, renames=renames)
    finder.check_renames()
    pair_is_meant = "input_ids" not in renames and ("prompts" in renames or "responses" in renames)
    input_ids = None if pair_is_meant else finder.find("input_ids")
    prompts = responses = None
    if input_ids is None:
        prompts, responses = finder.find("prompts"), finder.find("responses")
    pair = prompts is not None and responses is not None
    masks, values = finder.find_masks(), finder.find("values")
    response_mask = masks[0] if masks else None
    returns = finder.find("returns") if needs.returns else None
    rewards, reward = finder.find_rewards(needs.rewards)
    truncated = finder.find("truncated") if needs.truncated else None
    pair_of = {"input_ids": input_ids or (pair and prompts), "response_mask": response_mask or (pair and responses)}
    others = {"returns": returns, "values": values, "rewards": rewards or reward, "truncated": truncated}
    finder.require(needs, [name for name, column in (pair_of | others).items() if not column])
    for label in labels:
        finder.check_label(label)
    if needs.every_rename:
        finder.check_use({"returns": returns, "rewards": rewards, "reward": reward, "truncated": truncated})
    return Columns(
        input_ids=input_ids,
        prompts=prompts if pair else None,
        responses=responses if pair else None,
        response_mask=response_mask,
        attention_mask=finder.find("attention_mask"),
        values=values,
        returns=returns,
        rewards=rewards,
        reward=reward,
        truncated=truncated,
        uid=finder.find("uid"),
        labels=labels,
        narrowing=tuple(masks[1:]),
    )


def check_canonical(renames: dict[str, str]) -> None:
    """Raise DataError where a rename names no canonical column; this does not depend on any file."""
    unknown = [name for name in renames if name not in ALIASES]
    if unknown:
        raise DataError(
            f"--column {unknown[0]}={renames[unknown[0]]}: there is no canonical column {unknown[0]!r}"
            f"{_near(unknown[0], ALIASES)}",
            hint=f"canonical columns: {', '.join(ALIASES)}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SchemaResolver:
    """Looks up columns in one shard's schema."""

    schema: pa.Schema
    shard: Shard
    renames: dict[str, str]

    def find(self, name: str) -> str | None:
        """The shard's column for a canonical name, None where it has none."""
        names = self.schema.names
        if name in self.renames:
            return self._checked(name, self.renames[name])
        fitting = self._fitting(name)
        # Texts are allowed under these names, and one number a rollout under `rewards`.
        may_be_else = name in ("prompts", "responses", "rewards")
        if name in names and (self._fits(name, name) or not (fitting or may_be_else)):
            return self._checked(name, name)
        if len(fitting) > 1:
            raise DataError(
                f"{self.shard.name}: {' and '.join(fitting)} could each be {name}",
                hint=f"say which: --column {name}={fitting[0]}",
            )
        return self._checked(name, fitting[0]) if fitting else None

    def find_masks(self) -> list[str]:
        """The columns that are masks of the response; one alone where it is renamed."""
        if "response_mask" in self.renames:
            return [self._checked("response_mask", self.renames["response_mask"])]
        fitting = self._fitting("response_mask")
        if "response_mask" in self.schema.names and (self._fits("response_mask", "response_mask") or not fitting):
            fitting.insert(0, self._checked("response_mask", "response_mask"))
        for name in fitting:
            self._check_single(name)
        return fitting

    def _fitting(self, name: str) -> list[str]:
        """The aliases of a canonical name that the shard has, of a type that fits."""
        taken = self.renames.values()
        return [a for a in ALIASES[name] if a in self.schema.names and a not in taken and self._fits(name, a)]

    def find_rewards(self, need: Need) -> tuple[str | None, str | None]:
        """The columns for `rewards` and `reward`, of which one is used: that of tokens where there are both."""
        if need == "no":
            return None, None
        try:
            wanted_once = "reward" in self.renames and "rewards" not in self.renames
            rewards = None if wanted_once else self.find("rewards")
            return rewards, None if rewards else self.find("reward")
        except DataError:
            if need == "yes" or "rewards" in self.renames or "reward" in self.renames:
                raise
            return None, None

    def check_renames(self) -> None:
        """Raise where a rename names no column of the shard, or another rename overrules it."""
        for name, others in OVERRULED.items():
            over = [other for other in others if other in self.renames and name in self.renames]
            if over:
                raise DataError(
                    f"--column {name}={self.renames[name]} has no effect beside --column {over[0]}="
                    f"{self.renames[over[0]]}: a shard has one of the two",
                    hint="leave one of them out",
                )
        names = self.schema.names
        for name, column in self.renames.items():
            if column not in names:
                raise DataError(
                    f"--column {name}={column}: {self.shard.name} has no column {column!r}{_near(column, names)}",
                    hint=f"its columns are: {', '.join(names)}",
                )

    def check_use(self, read: dict[str, str | None]) -> None:
        """Raise where a rename is of a column that is not read."""
        for name, column in read.items():
            if name in self.renames and column is None:
                raise DataError(
                    f"--column {name}={self.renames[name]} has no effect: {name} is not read with these flags",
                    hint="leave it out; --returns column reads returns, mc and gae read rewards, and --truncated "
                    "bootstrap or drop read truncated",
                )

    def check_label(self, label: str) -> None:
        """Raise DataError where a column does not have one value a rollout."""
        names = self.schema.names
        if label not in names:
            raise DataError(
                f"{self.shard.name} has no column {label!r}{_near(label, names)}",
                hint=f"--by takes one of: {', '.join(names)}",
            )
        self._check_single(label)
        if is_nested(self.schema.field(label).type):
            raise DataError(
                f"{self.shard.name}, column {label}: found {self.schema.field(label).type}, expected {SINGLE}",
                hint="--by takes a column with one value a rollout",
            )

    def require(self, needs: Needs, missing: list[str]) -> None:
        """Raise where one of the missing columns is needed."""
        wanted = {
            "returns": needs.returns is True,
            "values": needs.values,
            "rewards": needs.rewards == "yes",
            "truncated": needs.truncated is True,
        }
        needed = [name for name in missing if wanted.get(name, True)]
        if needed:
            self.fail_for_missing(needed, needs.advice)

    def fail_for_missing(self, missing: list[str], advice: Mapping[str, str]) -> NoReturn:
        """Raise DataError that lists the missing columns and those the shard has."""
        lacking = "\n".join(f"  {name}: {MEANING[name]}" for name in missing)
        there = "\n".join(f"  {field.name}: {field.type}" for field in self.schema)
        hints = []
        if "input_ids" in missing and any(_holds_text(kind) for kind in self.schema.types):
            hints.append(f"{convert_command([self.shard.name])} makes token ids of texts")
        close = difflib.get_close_matches(missing[0], self.schema.names, n=1)
        hints.append(f"--column {missing[0]}={close[0] if close else 'NAME'} reads it under another name")
        hints += [advice[name] for name in missing if name in advice]
        raise DataError(f"{self.shard.name} lacks\n{lacking}\nIt has\n{there or '  no columns'}", hint="; ".join(hints))

    def _checked(self, name: str, column: str) -> str:
        self._check_single(column)
        if not self._fits(name, column):
            raise DataError(
                f"{self.shard.name}, column {column}: found {self.schema.field(column).type}, "
                f"expected {EXPECTED.get(name, NUMBERS)} (as {name})",
                hint=f"--column {name}=NAME reads another column",
            )
        return column

    def _check_single(self, column: str) -> None:
        if self.schema.names.count(column) > 1:
            raise DataError(
                f"{self.shard.name} has several columns named {column}", hint="give them names of their own"
            )

    def _fits(self, name: str, column: str) -> bool:
        kind = self.schema.types[self.schema.names.index(column)]
        expected = EXPECTED.get(name, NUMBERS)
        if expected is SINGLE:
            return not is_nested(kind)
        if expected is NUMBER:
            return is_number(kind)
        if expected is TRUTH:
            return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind))
        item = list_item_type(kind)
        if item is None:
            return False
        if expected is INTEGERS:
            return bool(pa.types.is_integer(item))
        if column == "labels" and name == "response_mask" and column not in self.renames.values():
            return bool(pa.types.is_integer(item))
        if column in MAY_BE_TOKEN_IDS and column not in self.renames.values():
            return bool(pa.types.is_floating(item))
        return is_number(item)


def _holds_text(kind: pa.DataType) -> bool:
    """Text, or a list or struct with text in it."""
    item = list_item_type(kind)
    if item is not None:
        return _holds_text(item)
    if pa.types.is_struct(kind):
        return any(_holds_text(field.type) for field in kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
