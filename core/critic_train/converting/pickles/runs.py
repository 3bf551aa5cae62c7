"""Numbers as a pickle writes them, a run of them at once: lists of token ids are nearly all of a dump."""

import re
from typing import Any

import numpy as np

# Possessive, so that the matcher's memory does not grow with a run's length.
BYTES = re.compile(rb"(?:K.){8,2000}+", re.DOTALL)
INTEGERS = re.compile(rb"(?:K.|M..|J....){8,2000}+", re.DOTALL)
INTEGER = re.compile(rb"K.|M..|J....", re.DOTALL)
FLOATS = re.compile(rb"(?:G.{8}){4,2000}+", re.DOTALL)
FLOAT = np.dtype([("opcode", "u1"), ("value", ">f8")])
SIZES = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
"""Opcode of a whole number -> its bytes; the last is signed."""


def integers(data: memoryview, at: int) -> tuple[list[Any], int]:
    """The whole numbers from an opcode on.

    Args:
        data: a pickle.
        at: place of an opcode of SIZES.

    Returns:
        One number or more, and where they end; behind the end of `data` where one is cut off.
    """
    found = BYTES.match(data, at)
    if found is not None:
        return list(found.group()[1::2]), found.end()
    found = INTEGERS.match(data, at)
    if found is not None:
        return [_integer(item) for item in INTEGER.findall(found.group())], found.end()
    end = at + 1 + SIZES[data[at]]
    return [_integer(bytes(data[at:end]))], end


def floats(data: memoryview, at: int) -> tuple[list[Any], int]:
    """The same of floats, from an opcode `G` on."""
    found = FLOATS.match(data, at)
    content = bytes(data[at : at + FLOAT.itemsize]) if found is None else found.group()
    if len(content) < FLOAT.itemsize:
        return [], at + FLOAT.itemsize
    return np.frombuffer(content, dtype=FLOAT)["value"].tolist(), at + len(content)


def _integer(item: bytes) -> int:
    return int.from_bytes(item[1:], "little", signed=item[0] == ord("J"))
