"""What a benchmark is: a module of bench.entries with a NAME, a TITLE and a `run`.

    NAME = "planning"                                  # python -m bench planning
    TITLE = "Planning a million rollouts"
    DEVICES = ("cpu",)                                 # where it runs; ("cuda",) is passed over without a GPU,
                                                       # () runs only where it is named

    def run(options: Options) -> Table: ...

A new file in bench/entries is a new benchmark; nothing else has to know of it.
"""

import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

import bench.entries
from critic_train.settings import Preset


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for.

    Attributes:
        device: where to compute.
        rounds: how often each thing is measured; medians are shown.
        size: "quick" to try a benchmark out, "usual", or "full" for every setting.
        rollouts: a folder with train and val, on which critics are compared in place of drawn worlds.
        model: what those critics start from.
        keep: where drawn worlds are kept.
        world: "chain", "adding" or "policy", the kind of drawn worlds; None for all.
        only: of what is compared, this alone; None for all of it.
        yardstick_preset: the size of the yardstick where it starts from no model.
        yardstick_steps: the most steps that it takes.
        minutes: how long `device` may take.
        json: where the results go; None for nowhere.
    """

    device: torch.device
    rounds: int = 5
    size: str = "usual"
    rollouts: Path | None = None
    model: Path | None = None
    keep: Path | None = None
    world: str | None = None
    only: str | None = None
    yardstick_preset: Preset = "tiny"
    yardstick_steps: int | None = None
    minutes: float = 11.0
    json: Path | None = None

    @property
    def quick(self) -> bool:
        """Whether the smallest sizes are enough."""
        return self.size == "quick"


@dataclass(kw_only=True)
class Table:
    """What a benchmark found.

    Attributes:
        columns: name -> how its cells are shown, as in ".2f"; "" for as they are.
        rows: one cell for each column; None is shown as a dash.
        notes: what a reader must know, in sentences.
    """

    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and show it on stderr: some take minutes, and what was found must not wait for the rest."""
        self.rows.append(row)
        cells = [f"{name} {_shown(row[name], form)}" for name, form in self.columns.items() if name in row]
        print(", ".join(cells), file=sys.stderr, flush=True)

    def lines(self) -> list[str]:
        """The table as text, columns aligned."""
        cells = [list(self.columns)]
        cells += [[_shown(row.get(name), form) for name, form in self.columns.items()] for row in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        left = [isinstance(row.get(name), str) for row in self.rows[:1] for name in self.columns]
        shown = [
            "  ".join(
                cell.ljust(width) if at < len(left) and left[at] else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return shown + self.notes


class Entry(Protocol):
    """A module of bench.entries."""

    NAME: str
    TITLE: str
    DEVICES: tuple[str, ...]

    def run(self, options: Options) -> Table:
        """Measure."""


def entries() -> dict[str, Entry]:
    """All benchmarks by name, in the order of their files."""
    modules = [
        cast(Entry, importlib.import_module(f"bench.entries.{found.name}"))
        for found in pkgutil.iter_modules(bench.entries.__path__)
    ]
    return {module.NAME: module for module in modules}


def _shown(cell: Any, form: str) -> str:
    return "-" if cell is None else format(cell, form) if form else str(cell)
