"""A shard's schema is understood without asking, or refused with what to do about it."""

from itertools import chain
from typing import Any

import pyarrow as pa
import pytest

from critic_train.data.schema import ALIASES, Needs
from critic_train.errors import DataError

READ = [(name, alias) for name in ("input_ids", "response_mask", "values", "returns") for alias in ALIASES[name]]


@pytest.mark.parametrize(("name", "alias"), READ)
def test_every_alias(shards: Any, good: dict[str, Any], listed: Any, name: str, alias: str) -> None:
    plain = listed(shards.read(good))
    good[alias] = good.pop(name)
    shards.write(good)
    reader = shards.reader()
    (batch,) = reader
    assert listed(batch) == plain
    assert reader.notices == [f"`{alias}` is read as {name}"]


@pytest.mark.parametrize("alias", ALIASES["uid"])
def test_every_alias_of_uid(shards: Any, good: dict[str, Any], alias: str) -> None:
    keys = shards.read({**good, alias: ["x", "y", "x"]}).group
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("prompts", ["prompts", *ALIASES["prompts"]])
@pytest.mark.parametrize("responses", ["responses", *ALIASES["responses"]])
def test_every_alias_of_the_pair(shards: Any, good: dict[str, Any], prompts: str, responses: str) -> None:
    ids = good.pop("input_ids")
    shards.write({**good, prompts: [row[:1] for row in ids], responses: [row[1:] for row in ids]})
    reader = shards.reader()
    (batch,) = reader
    assert batch.input_ids.tolist() == list(chain.from_iterable(ids))
    assert reader.notices == [f"`{prompts}` and `{responses}` together are read as input_ids"]


@pytest.mark.parametrize("name", ["input_ids", "response_mask", "values", "returns"])
def test_renames_win_over_names_and_aliases(shards: Any, good: dict[str, Any], listed: Any, name: str) -> None:
    plain = listed(shards.read(good))
    good["mine"] = good[name]
    good[name] = [[0] for _ in good[name]]
    assert listed(shards.read(good, renames={name: "mine"})) == plain


def test_a_renamed_pair_wins_over_input_ids(shards: Any, good: dict[str, Any]) -> None:
    pair = {"p": [row[:1] for row in good["input_ids"]], "r": [[1, *row[2:]] for row in good["input_ids"]]}
    found = shards.read({**good, **pair}, renames={"prompts": "p", "responses": "r"})
    assert found.input_ids.tolist() == [5, 1, 7, 8, 9, 1, 11, 5, 1, 12, 13, 14]


def refused(shards: Any, columns: Any, **options: Any) -> DataError:
    shards.write(columns)
    with pytest.raises(DataError) as caught:
        list(shards.reader(**options))
    return caught.value


def test_a_rename_of_nothing(shards: Any, good: dict[str, Any]) -> None:
    fault = refused(shards, {**good, "my_returns": good["returns"]}, renames={"returns": "my_return"})
    assert "--column returns=my_return" in fault.message
    assert "did you mean 'my_returns'?" in fault.message
    assert "its columns are: input_ids, response_mask" in fault.hint
    assert "no column 'zzz'" in refused(shards, good, renames={"rewards": "zzz"}).message


def test_a_rename_to_nothing(shards: Any, good: dict[str, Any]) -> None:
    fault = refused(shards, good, renames={"retunrs": "returns"})
    assert "no canonical column 'retunrs'; did you mean 'returns'?" in fault.message


@pytest.mark.parametrize("name", ["input_ids", "response_mask", "values", "returns"])
def test_a_missing_column_is_named_beside_those_there(shards: Any, good: dict[str, Any], name: str) -> None:
    good[f"{name}_x"] = good.pop(name)
    fault = refused(shards, good)
    assert f"a.parquet lacks\n  {name}: " in fault.message
    assert f"  {name}_x: list<" in fault.message
    assert fault.hint == f"--column {name}={name}_x reads it under another name"


def test_all_missing_columns_are_named_at_once(shards: Any) -> None:
    fault = refused(shards, {"text": ["a"]})
    for name in ("input_ids", "response_mask", "returns", "values"):
        assert f"  {name}: " in fault.message
    assert "  text: string" in fault.message


def test_values_may_be_missing_where_they_are_not_needed(shards: Any, good: dict[str, Any]) -> None:
    del good["values"]
    assert shards.read(good, needs=Needs(values=False)).values is None


def test_values_in_some_files_only_are_left_out_and_said(shards: Any, good: dict[str, Any]) -> None:
    shards.write(good, "a.parquet")
    del good["values"]
    shards.write(good, "b.parquet")
    reader = shards.reader(needs=Needs(values=False))
    assert all(batch.values is None for batch in reader)
    assert "1 of 2 files have no values" in reader.notices[0]
    with pytest.raises(DataError, match=r"b\.parquet lacks\n  values"):
        list(shards.reader())


def test_two_aliases_are_ambiguous(shards: Any, good: dict[str, Any]) -> None:
    good["old_values"] = good["vpreds"] = good.pop("values")
    fault = refused(shards, good)
    assert "old_values and vpreds could each be values" in fault.message
    assert fault.hint == "say which: --column values=old_values"
    assert len(shards.read(good, renames={"values": "vpreds"})) == 3


def test_what_is_not_read_may_be_ambiguous(shards: Any, good: dict[str, Any]) -> None:
    unread = ("token_level_rewards", "reward_tokens", "prompt_ids", "prompt_token_ids")
    assert len(shards.read({**good, **dict.fromkeys(unread, good["returns"])})) == 3


def test_an_alias_of_the_wrong_type_is_something_else(shards: Any, good: dict[str, Any]) -> None:
    good["action_mask"] = good.pop("response_mask")
    columns = {**good, "mask": ["a", "b", "c"], "ids": [1, 2, 3], "value": [{"x": 1}] * 3, "targets": [["t"]] * 3}
    columns |= {"prompts": ["hello"] * 3, "responses": ["there"] * 3, "prompt_id": [[1]] * 3}
    columns["loss_mask"] = pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64()))
    assert len(shards.read(columns)) == 3


WRONG = {
    "text": pa.array(["a"] * 3),
    "numbers": pa.array([1.0] * 3),
    "structs": pa.array([{"a": 1}] * 3),
    "maps": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "lists of text": pa.array([["a"]] * 3),
    "lists of lists": pa.array([[[1]]] * 3),
    "lists of decimals": pa.array([[1]] * 3, pa.list_(pa.decimal128(5))),
    "lists of structs": pa.array([[{"a": 1}]] * 3),
    "lists of nothing": pa.array([[]] * 3),
    "nothing": pa.nulls(3),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["input_ids", "response_mask", "values", "returns"])
def test_a_column_of_the_wrong_type_is_refused(shards: Any, good: dict[str, Any], name: str, wrong: str) -> None:
    good[name] = WRONG[wrong]
    fault = refused(shards, good)
    kind = WRONG[wrong].type
    expected = "a list of integers" if name == "input_ids" else "a list of numbers or booleans"
    assert f"a.parquet, column {name}: found " in fault.message
    assert str(kind).split("<")[0] in fault.message
    assert f"expected {expected} (as {name})" in fault.message


def test_float_ids_are_refused(shards: Any, good: dict[str, Any]) -> None:
    good["input_ids"] = [[float(i) for i in row] for row in good["input_ids"]]
    assert "expected a list of integers" in refused(shards, good).message


@pytest.mark.parametrize("uid", [[[1]] * 3, [{"a": 1}] * 3])
def test_a_uid_of_several_values_is_refused(shards: Any, good: dict[str, Any], uid: Any) -> None:
    assert "expected one value a rollout (as uid)" in refused(shards, {**good, "uid": uid}).message


@pytest.mark.parametrize("name", ["returns", "uid"])
def test_a_column_that_is_there_twice_is_refused(shards: Any, good: dict[str, Any], name: str) -> None:
    good["uid"] = ["a", "b", "c"]
    columns = [pa.array(rows) for rows in good.values()]
    table = pa.Table.from_arrays([*columns, columns[list(good).index(name)]], names=[*good, name])
    assert f"several columns named {name}" in refused(shards, table).message


def test_labels_that_do_not_fit(shards: Any, good: dict[str, Any]) -> None:
    fault = refused(shards, {**good, "task": ["a", "b", "c"]}, labels=["tasks"])
    assert "no column 'tasks'; did you mean 'task'?" in fault.message
    assert "--by takes one of: input_ids" in fault.hint
    assert "expected one value a rollout" in refused(shards, good, labels=["returns"]).message
    assert "expected one value a rollout" in refused(shards, {**good, "s": [{"a": 1}] * 3}, labels=["s"]).message


def test_column_names_with_dots(shards: Any, good: dict[str, Any]) -> None:
    good["my.returns"] = good.pop("returns")
    good["my"] = [1, 2, 3]
    found = shards.read(good, renames={"returns": "my.returns"}, labels=["my"])
    assert found.returns.tolist() == list(chain.from_iterable(good["my.returns"]))
    assert found.labels["my"].tolist() == [1, 2, 3]
