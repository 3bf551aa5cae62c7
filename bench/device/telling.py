"""How a part tells what it has learnt: a line for people and facts for programs, as soon as they are there."""

import json
from typing import Any

MARK = "\x1e"
"""Begins a line of standard output that is a finding."""


def tell(line: str, **facts: Any) -> None:
    """Print a finding; it is kept whatever happens afterwards."""
    print(MARK + json.dumps({"line": line, **facts}, default=str), flush=True)
