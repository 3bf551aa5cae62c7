"""How soon the program answers when no job is started: pages, the version, mistakes on the command line."""

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.entry import Options, Table

NAME = "startup"
TITLE = "The command line until its answer: help pages, an unknown flag, a wrong value"
DEVICES = ("cpu",)

ROOT = Path(__file__).parents[2]
COMMAND_LINES = ("--help", "--version", "fit --help", "fit --epoch", "fit --epochs two")
LEAST_ROUNDS = 5


def run(options: Options) -> Table:
    """Start the program again and again, the command lines in turn."""
    figures: dict[str, list[tuple[float, float]]] = {line: [] for line in COMMAND_LINES}
    rounds = max(options.rounds, 1 if options.quick else LEAST_ROUNDS)
    for number in range(rounds + 1):
        for line in COMMAND_LINES:
            seconds = measure(line)
            if number:
                figures[line].append(seconds)
    table = Table(columns={"critic-train": "", "CPU ms": ".0f", "wall ms": ".0f"})
    for line, measured in figures.items():
        cpu, wall = (statistics.median(column) * 1000 for column in zip(*measured, strict=True))
        table.rows.append({"critic-train": line, "CPU ms": cpu, "wall ms": wall})
    table.notes = [f"medians of {rounds} starts; the goal for pages is 250 ms of CPU; wall time counts other work too"]
    return table


def measure(line: str) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of the program with these arguments, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "core"), str(ROOT / "cli")])}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "critic_train_cli", *line.split()], env=environment, capture_output=True)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - began
