"""How a shard's schema is understood: names, aliases, types."""

import difflib
from dataclasses import dataclass

import pyarrow as pa

from critic_train.data.shards import Shard
from critic_train.errors import DataError

ALIASES: dict[str, tuple[str, ...]] = {
    "input_ids": ("tokens", "token_ids", "ids", "sequences"),
    "prompts": ("prompt_ids", "prompt_token_ids"),
    "responses": ("response_ids", "response_token_ids", "completion_ids"),
    "response_mask": (
        "mask",
        "loss_mask",
        "loss_masks",
        "action_mask",
        "response_masks",
        "token_loss_mask",
        "completion_mask",
        "assistant_masks",
    ),
    "values": ("old_values", "value", "vpreds", "critic_values", "v_old"),
    "returns": ("return", "value_targets", "targets", "returns_to_go"),
    "rewards": ("token_level_rewards", "reward_tokens"),
    "uid": ("group_id", "prompt_id", "group_index", "request_id"),
    "attention_mask": (),
}
"""Canonical name -> names that mean the same elsewhere, most specific first."""

INTEGER, NUMBER, ANY = "a list of integers", "a list of numbers or booleans", "anything"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of one shard: canonical name -> the shard's name, None where it has none.

    Either `input_ids` is set, or `prompts` and `responses` are.
    """

    input_ids: str | None
    prompts: str | None
    responses: str | None
    response_mask: str | None
    attention_mask: str | None
    values: str | None
    returns: str
    uid: str | None
    labels: tuple[str, ...]

    def names(self) -> list[str]:
        """The shard's columns that are read, each once."""
        fields = (
            self.input_ids,
            self.prompts,
            self.responses,
            self.response_mask,
            self.attention_mask,
            self.values,
            self.returns,
            self.uid,
        )
        return list(dict.fromkeys([name for name in fields if name is not None] + list(self.labels)))

    def notices(self) -> list[str]:
        """What was understood without being said, in sentences."""
        said = [
            f"`{getattr(self, name)}` is read as {name}"
            for name in ("input_ids", "response_mask", "values", "returns", "uid")
            if getattr(self, name) not in (None, name)
        ]
        if self.input_ids is None:
            said.append(f"`{self.prompts}` and `{self.responses}` together are read as input_ids")
            if self.response_mask is None:
                said.append(f"there is no response_mask: all of `{self.responses}` counts as response")
        return said


def understand(
    schema: pa.Schema, shard: Shard, *, renames: dict[str, str], labels: tuple[str, ...], need_values: bool
) -> Columns:
    """Find the canonical columns in a shard's schema.

    Args:
        schema: Arrow schema of the shard.
        shard: for the messages.
        renames: canonical name -> the shard's column; wins over names and aliases.
        labels: per-rollout columns to carry along.
        need_values: whether values must be there.

    Raises:
        DataError: a required column is missing, ambiguous or of the wrong type.
    """
    unknown = [name for name in renames if name not in ALIASES]
    if unknown:
        raise DataError(
            f"--column {unknown[0]}={renames[unknown[0]]}: there is no canonical column {unknown[0]!r}"
            f"{_near(unknown[0], list(ALIASES))}",
            hint=f"canonical columns: {', '.join(ALIASES)}",
        )
    found = {name: _find(name, schema, shard, renames) for name in ALIASES}
    pair = found["input_ids"] is None and found["prompts"] is not None and found["responses"] is not None
    if found["input_ids"] is None and not pair:
        _missing("input_ids", schema, shard, "or prompts and responses, the token ids of each")
    if found["response_mask"] is None and not pair:
        _missing("response_mask", schema, shard, "1 on the tokens the policy chose")
    returns = found["returns"]
    if returns is None:
        _missing("returns", schema, shard, "the regression target of every response token")
    if need_values and found["values"] is None:
        _missing(
            "values", schema, shard, "the values stored at rollout time", "or --old-values none trains without them"
        )
    kinds = {"input_ids": INTEGER, "prompts": INTEGER, "responses": INTEGER, "uid": ANY}
    for name, column in found.items():
        used = name in ("uid", "returns", "values", "response_mask", "attention_mask") or (
            name in ("prompts", "responses") if pair else name == "input_ids"
        )
        if column is not None and used:
            _check_type(column, name, schema.field(column).type, kinds.get(name, NUMBER), shard)
    for label in labels:
        if label not in schema.names:
            raise DataError(
                f"{shard.name} has no column {label!r}{_near(label, schema.names)}",
                hint=f"--by takes one of: {', '.join(schema.names)}",
            )
        if _item_type(schema.field(label).type) is not None:
            raise DataError(f"{shard.name}: column {label} holds lists; --by needs one value a rollout")
    return Columns(
        input_ids=None if pair else found["input_ids"],
        prompts=found["prompts"] if pair else None,
        responses=found["responses"] if pair else None,
        response_mask=found["response_mask"],
        attention_mask=found["attention_mask"],
        values=found["values"],
        returns=returns or "",
        uid=found["uid"],
        labels=labels,
    )


def _find(name: str, schema: pa.Schema, shard: Shard, renames: dict[str, str]) -> str | None:
    if name in renames:
        column = renames[name]
        if column not in schema.names:
            raise DataError(
                f"--column {name}={column}: {shard.name} has no column {column!r}{_near(column, schema.names)}",
                hint=f"its columns are: {', '.join(schema.names)}",
            )
        return column
    if name in schema.names:
        return name
    present = [alias for alias in ALIASES[name] if alias in schema.names]
    if len(present) > 1:
        raise DataError(
            f"{shard.name}: {' and '.join(present)} could both be {name}",
            hint=f"say which: --column {name}={present[0]}",
        )
    return present[0] if present else None


def _missing(name: str, schema: pa.Schema, shard: Shard, meaning: str, otherwise: str = "") -> None:
    columns = "\n".join(f"  {field.name}: {field.type}" for field in schema)
    raise DataError(
        f"{shard.name} has no column {name} ({meaning}); it has\n{columns}",
        hint=f"--column {name}=NAME reads it under another name{'; ' if otherwise else ''}{otherwise}",
    )


def _check_type(column: str, name: str, kind: pa.DataType, expected: str, shard: Shard) -> None:
    item = _item_type(kind)
    if expected is ANY:
        held = item is None
        expected = "one value a rollout"
    elif expected is INTEGER:
        held = item is not None and pa.types.is_integer(item)
    else:
        number = item is not None and (pa.types.is_integer(item) or pa.types.is_floating(item))
        held = number or (item is not None and pa.types.is_boolean(item))
    if not held:
        raise DataError(
            f"{shard.name}, column {column}: found {kind}, expected {expected} (as {name})",
            hint=f"--column {name}=NAME reads another column",
        )


def _item_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of a list's items, None for what is no list."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return kind.value_type
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return kind.value_type
    return None


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
