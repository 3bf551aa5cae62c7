"""Text for people: figures in few digits, a dash where there is none, and secrets hidden."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "-"


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: Any, digits: int = 3) -> str:
    """A figure near one, as explained variance is: `0.412`."""
    finite = number(value)
    return DASH if finite is None else f"{finite:.{digits}f}"


def short(value: Any) -> str:
    """A figure of any size in four digits: `0.04213`, `4.7e-05`."""
    finite = number(value)
    return DASH if finite is None else f"{finite:.4g}"


def three(value: Any) -> str:
    """A figure of any size in three digits, zeros kept so that a column lines up: `0.100`, `0.0708`."""
    finite = number(value)
    return DASH if finite is None else f"{finite:#.3g}".rstrip(".")


def signed(value: Any) -> str:
    """A figure whose sign matters, as a bias: `+0.0040`; four decimals, so that a column lines up."""
    finite = number(value)
    if finite is None:
        return DASH
    return f"{finite:+.4f}" if finite == 0 or 5e-5 <= abs(finite) < 100 else f"{finite:+.3g}"


def percent(value: Any, digits: int = 1) -> str:
    """A share of one as a percentage: `3.1 %`."""
    finite = number(value)
    return DASH if finite is None else f"{100 * finite:.{digits}f} %"


def interval(bounds: Any) -> str:
    """A confidence interval: `[0.380, 0.441]`, or nothing where there is none."""
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or None in (number(bounds[0]), number(bounds[1])):
        return ""
    return f"[{fixed(bounds[0])}, {fixed(bounds[1])}]"


def with_interval(value: Any, bounds: Any) -> str:
    """A figure and its interval: `0.412 [0.380, 0.441]`."""
    return f"{fixed(value)} {interval(bounds)}".rstrip()


def count(value: Any) -> str:
    """A count or a rate in three digits: `950`, `12.3k`, `4.56M`."""
    finite = number(value)
    if finite is None:
        return DASH
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if abs(finite) < 999.5 * size or unit == "G":
            scaled = finite / size
            digits = 0 if not unit and finite == int(finite) else max(0, 2 - len(str(int(abs(scaled)))) + 1)
            return f"{scaled:.{min(digits, 2)}f}{unit}"
    return DASH


def format_bytes(value: Any) -> str:
    """A number of bytes: `950 B`, `5.1 MB`, `1.2 TB`."""
    finite = number(value)
    if finite is None:
        return DASH
    for unit, one in (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if finite < 999.5 * one or unit == "TB":
            return f"{finite / one:.{0 if unit == 'B' or finite >= 99.5 * one else 1}f} {unit}"
    return DASH


def duration(seconds: Any) -> str:
    """Seconds as a clock shows them: `0:07`, `12:34`, `3:05:00`, `2d 03:05`."""
    finite = number(seconds)
    if finite is None or finite < 0:
        return DASH
    minutes, rest = divmod(round(finite), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


HIDDEN = "***"
MIN_SECRET_LENGTH = 8
"""The value of a variable that is shorter may occur in any text, and is not taken for a secret."""
SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?:_|$)", re.IGNORECASE
)
PATTERNS = (
    (re.compile(r"(?<=://)[^/@\s\"'<>]+(?=@)"), HIDDEN),  # user and password of an address
    (
        re.compile(
            r"([?&;](?:[\w.-]*(?:token|secret|signature|password|credential|key)[\w.-]*|sig)=)[^&;\s\"'<>\\]+", re.I
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[\w-]{20,})"), HIDDEN),
)
"""Secrets by their shape."""


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text with every secret in it hidden: in addresses, of well-finite shapes, and those the environment holds.

    Args:
        text: to be written somewhere.
        environment: the variables of which those with a name like TOKEN or API_KEY hold secrets.
    """
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    for name, value in environment.items():
        if len(value) >= MIN_SECRET_LENGTH and SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN).replace(json.dumps(value)[1:-1], HIDDEN)
    return text
