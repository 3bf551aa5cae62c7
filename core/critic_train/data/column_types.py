"""What Arrow's types are to a shard: lists of any kind, numbers, several values a row."""

import pyarrow as pa


def list_item_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of the items of any kind of list; None for other types."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return kind.value_type
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return kind.value_type
    return None


def is_number(kind: pa.DataType) -> bool:
    """Integers, floats and booleans."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_nested(kind: pa.DataType) -> bool:
    """Lists, structs, maps, unions: several values a row."""
    return bool(pa.types.is_nested(kind)) or list_item_type(kind) is not None
