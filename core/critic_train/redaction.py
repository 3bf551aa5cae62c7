"""Keep secrets out of whatever is written: logs, records, reports, error messages, crash logs."""

import json
import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST = 8
"""Shorter values of variables are words like any other."""
SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?:_|$)", re.IGNORECASE
)
WORDS = "token|secret|signature|password|credential|key"
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
    """A text with every secret in it hidden: in addresses, of well-known shapes, and those the environment holds.

    Args:
        text: to be written somewhere.
        environment: whose variables with telling names hold secrets.
    """
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    for name, value in environment.items():
        if len(value) >= SHORTEST and SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN).replace(json.dumps(value)[1:-1], HIDDEN)
    return text
