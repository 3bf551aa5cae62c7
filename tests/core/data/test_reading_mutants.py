"""A few hundred damaged shards, the same each time; `python tests/fuzz/run.py` reads ten thousand."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
MUTANTS = 300
FOUND = (0, 75, 132, 179, 1356, 2612, 5530, 6424, 6726, 9157, 9492, 9724, 9999, 21378, 22483, 22600, 22840)
"""Mutants on which an earlier version failed: 3 GB of memory, a traceback, or a crash inside Arrow. On the last four
pyarrow 26 ends the process when it is asked for the metadata of a column chunk."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("numbers", [range(1000, 1000 + MUTANTS), FOUND], ids=["many", "found"])
def test_mutants_are_read_or_refused_and_nothing_else(numbers: Sequence[int]) -> None:
    command = [sys.executable, str(FUZZ / "run.py"), "--numbers", ",".join(map(str, numbers))]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert shown.returncode == 0, shown.stdout
    counts = shown.stdout.splitlines()[1]
    assert counts.startswith(f"{len(numbers)} mutants: ")
    assert "refused" in counts


def test_the_same_number_is_the_same_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FUZZ))
    from corpus import seeds
    from mutate import mutant

    files = [content for _, content in seeds()]
    random.seed(1)
    first = [mutant(files[0], number, files) for number in range(50)]
    random.seed(2)
    assert [mutant(files[0], number, files) for number in range(50)] == first
    assert len(set(first)) > 45
