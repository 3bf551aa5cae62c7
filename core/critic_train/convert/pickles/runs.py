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
        return _mixed(found.group()), found.end()
    end = at + 1 + SIZES[data[at]]
    return [int.from_bytes(data[at + 1 : end], "little", signed=data[at] == ord("J"))], end


def floats(data: memoryview, at: int) -> tuple[list[Any], int]:
    """The same of floats, from an opcode `G` on."""
    found = FLOATS.match(data, at)
    content = bytes(data[at : at + FLOAT.itemsize]) if found is None else found.group()
    if len(content) < FLOAT.itemsize:
        return [], at + FLOAT.itemsize
    return np.frombuffer(content, dtype=FLOAT)["value"].tolist(), at + len(content)


def _mixed(run: bytes) -> list[int]:
    """Numbers of one, two and four bytes, each behind its opcode."""
    sizes = np.fromiter(map(len, INTEGER.findall(run)), dtype=np.int64)
    ends = np.cumsum(sizes)
    content = np.frombuffer(run, dtype=np.uint8).astype(np.uint32)
    values = content[ends - sizes + 1]
    for place in (2, 3, 4):
        longer = np.flatnonzero(sizes > place)
        values[longer] |= content[ends[longer] - sizes[longer] + place] << np.uint32(8 * (place - 1))
    found: list[int] = values.view(np.int32).tolist()
    return found
