"""Long names made short."""

from collections.abc import Sequence
from pathlib import PurePath


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many of them as it takes to tell them apart."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for count in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-count:]).removeprefix("//") for p in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)
