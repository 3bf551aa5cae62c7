"""`critic-train convert` beside a plain copy by pyarrow of the shards that it makes.

    convert     what the command runs, without its start: read the dump, check, write shards, sync
    copy        pyarrow reads those shards and writes them again, zstd: the same bytes out, nothing understood

MB/s of a conversion is of the dump; of a copy, of the shards. The peaks are the most resident memory of the command as
a process of its own, for a few files and for ten times as many. "2 processes" is how many times as fast `--nproc 2` is,
on PROCESS_FILES files and by wall time: only a machine with two idle cores shows it.
"""

import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.dumps import WRITERS, drawn
from bench.entries.memory import peak_of
from bench.entry import Options, Table
from bench.measuring import in_turn, ratio
from critic_train.convert.conversion import convert
from critic_train.settings import ConvertSettings
from critic_train.stopping import StopRequest

NAME = "convert"
TITLE = "convert beside a plain copy of the same bytes, rollouts of 100 + 300 tokens"
DEVICES = ("cpu",)

FILES, A_FILE = 4, {"quick": 80, "usual": 504, "full": 504}
PROCESS_FILES = 16
MANY = {"quick": (), "usual": (2, 20), "full": (5, 50)}
"""Files for which the peaks are taken."""


def run(options: Options) -> Table:
    """Measure every format."""
    columns = {"format": "", "dump MB": ".1f", "convert/s": ",.0f", "MB/s": ".1f", "copy/s": ",.0f", "copy MB/s": ".1f"}
    columns |= {"times the copy": ".1f", "peak MB": ".0f", "ten times": ".0f", "2 processes": ".2f"}
    table = Table(columns=columns)
    for name in WRITERS:
        with tempfile.TemporaryDirectory() as temporary:
            row = _speed(name, Path(temporary), options) | _peaks(name, options)
            table.rows.append(row | _processes(name, Path(temporary), options))
    return table


def _speed(name: str, folder: Path, options: Options) -> dict[str, Any]:
    source, shards = folder / "dump", folder / "shards"
    _write(name, source, FILES, A_FILE[options.size])
    work = {"convert": partial(_convert, source, shards), "copy": partial(_copy, shards, folder / "copy")}
    seconds = in_turn(work, options.rounds)
    count = FILES * A_FILE[options.size]
    ours, copy = (statistics.median(seconds[which]) for which in work)
    dump_bytes, shard_bytes = _size_of(source), _size_of(shards)
    return {
        "format": name,
        "dump MB": dump_bytes / 1e6,
        "convert/s": count / ours,
        "MB/s": dump_bytes / ours / 1e6,
        "copy/s": count / copy,
        "copy MB/s": shard_bytes / copy / 1e6,
        "times the copy": ratio(seconds["convert"], seconds["copy"]),
    }


def _peaks(name: str, options: Options) -> dict[str, float]:
    """The most resident memory of the program, for few files and for many."""
    found: dict[str, float] = {}
    for what, files in zip(("peak MB", "ten times"), MANY[options.size], strict=False):
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary, "dump")
            _write(name, source, files, A_FILE[options.size])
            command = [sys.executable, "-m", "critic_train_cli", "convert", str(source), "--quiet"]
            found[what] = peak_of([*command, "--to", str(Path(temporary, "shards"))])
    return found


def _processes(name: str, folder: Path, options: Options) -> dict[str, float]:
    """Wall time on one process, by that on two."""
    _write(name, folder / "many", PROCESS_FILES, A_FILE[options.size])
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for count, taken in seconds.items():
            began = time.perf_counter()
            _convert(folder / "many", folder / "shards", count)
            taken.append(time.perf_counter() - began)
    return {"2 processes": ratio(seconds[1], seconds[2])}


def _write(name: str, folder: Path, files: int, rollouts: int) -> None:
    folder.mkdir()
    for place in range(files):
        WRITERS[name](drawn(rollouts, place), folder, place)


def _convert(source: Path, to: Path, nproc: int = 1) -> None:
    """Convert into a folder, whatever stood there."""
    shutil.rmtree(to, ignore_errors=True)
    for _ in convert(ConvertSettings(source=[str(source)], to=str(to), nproc=nproc), StopRequest()):
        pass


def _copy(shards: Path, to: Path) -> None:
    """The same shards by pyarrow alone."""
    to.mkdir(exist_ok=True)
    for path in shards.glob("*.parquet"):
        pq.write_table(pq.read_table(path, use_threads=False), to / path.name, compression="zstd")


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json" and path.is_file())
