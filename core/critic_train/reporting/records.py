"""JSON objects that know where they stand, so that every figure on the page can be looked up again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from critic_train.figures import fixed, interval


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure as the page shows it.

    Attributes:
        text: what is read.
        value: the figure itself as JSON text, empty where there is none.
        at: where it stands: source, file and JSON pointer (RFC 6901), as in `1:metrics.jsonl:12#/lr`.
    """

    text: str
    value: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and the place where it stands. What is missing in it is an empty record, not an error.

    Attributes:
        data: the object.
        at: its place, as in `Cell.at`.
    """

    data: Mapping[str, Any]
    at: str

    def __bool__(self) -> bool:
        return bool(self.data)

    def get(self, key: str) -> Any:
        """The plain value under a key, None where there is none."""
        return self.data.get(key)

    def part(self, key: str) -> "Record":
        """The object under a key, empty where there is none."""
        inner = self.data.get(key)
        return Record(inner if isinstance(inner, Mapping) else {}, pointer(self.at, key))

    def parts(self) -> "dict[str, Record]":
        """The objects under all keys."""
        return {key: self.part(key) for key, value in self.data.items() if isinstance(value, Mapping)}

    def rows(self, key: str) -> "list[Record]":
        """The objects of the list under a key."""
        inner = self.data.get(key)
        place = pointer(self.at, key)
        if not isinstance(inner, list):
            return []
        return [Record(row, pointer(place, i)) for i, row in enumerate(inner) if isinstance(row, Mapping)]

    def cell(self, key: str, how: Callable[[Any], str] = fixed) -> Cell:
        """The figure under a key, written by `how`; without a place where it does not exist."""
        value = self.data.get(key)
        if value is None:
            return Cell(how(None))
        return Cell(how(value), json.dumps(value), pointer(self.at, key))

    def bounds(self, key: str) -> Cell:
        """The interval under a key."""
        return self.cell(key, interval)


def pointer(at: str, key: str | int) -> str:
    """One step further along a JSON pointer."""
    return f"{at}/{str(key).replace('~', '~0').replace('/', '~1')}"
