"""Deterministic damage to a file: the same number, the same mutant."""

import random

ODD = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
SIZES = (1, 2, 4, 8)
HARMS = ("bit", "byte", "number", "cut", "repeat", "insert", "swap", "zero", "varint")


def mutant(content: bytes, number: int, others: list[bytes]) -> bytes:
    """A damaged copy. Half of all damage goes to the footer, which decides how the rest is read.

    Args:
        content: a sound file.
        number: which mutant.
        others: files to take pieces from.
    """
    draw = random.Random(number)
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if len(found) > 12:
            _harm(found, draw, others)
    return bytes(found)


def _harm(found: bytearray, draw: random.Random, others: list[bytes]) -> None:
    footer = int.from_bytes(found[-8:-4], "little")
    start = max(4, len(found) - 8 - footer) if draw.random() < 0.5 and footer < len(found) else 4
    at = draw.randrange(start, max(start + 1, len(found) - 8))
    kind = draw.choice(HARMS)
    if kind == "bit":
        found[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        found[at] = draw.choice(ODD)
    elif kind == "number":
        width = draw.choice(SIZES)
        found[at : at + width] = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)).to_bytes(8, "little")[
            :width
        ]
    elif kind == "varint":  # Thrift's compact integers, which say lengths, counts and places
        value, coded = (
            draw.choice((2**7, 2**14, 2**21, 2**30, 2**31, 2**32, 2**40, 2**63)) - draw.randrange(3),
            bytearray(),
        )
        while value > 127:
            coded.append(value & 127 | 128)
            value >>= 7
        coded.append(value)
        found[at : at + draw.choice((1, len(coded)))] = coded
    elif kind == "cut":
        del found[at : at + draw.choice((1, 2, 8, 64))]
    elif kind == "zero":
        size = min(draw.choice((4, 16, 64)), len(found) - at)
        found[at : at + size] = bytes(size)
    elif kind in ("repeat", "insert"):
        source = bytes(found) if kind == "repeat" else draw.choice(others)
        begin = draw.randrange(len(source))
        found[at:at] = source[begin : begin + draw.choice((1, 4, 16, 64))]
    else:
        other = draw.randrange(4, len(found) - 8)
        size = draw.choice((1, 4, 16))
        found[at : at + size], found[other : other + size] = found[other : other + size], found[at : at + size]
