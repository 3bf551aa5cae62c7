"""Types of columns; what a shard does with each is in test_schema."""

import pyarrow as pa
import pytest

from critic_train.data.column_types import is_nested, is_number, list_item_type

LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3), pa.list_view, pa.large_list_view]


@pytest.mark.parametrize("made", LISTS)
def test_lists_of_any_kind(made):
    assert list_item_type(made(pa.int32())) == pa.int32()
    assert is_nested(made(pa.int32()))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.int64(), pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int8())]
)
def test_other_types_are_no_lists(kind):
    assert list_item_type(kind) is None
    assert is_nested(kind) == pa.types.is_nested(kind)


def test_numbers():
    assert all(is_number(kind) for kind in (pa.bool_(), pa.uint8(), pa.float16()))
    assert not any(is_number(kind) for kind in (pa.string(), pa.null(), pa.decimal128(3)))
