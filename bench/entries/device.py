"""What one lease of one GPU should tell, most information first: `python -m bench device --minutes 11 --json FILE`.

Each part is a process of its own with a limit in seconds. Its findings are printed, and appended to FILE.parts.jsonl,
as they are made: one that is cut off, or a machine that goes away, still tells what was found until then. Parts that
ended are not repeated by another call with the same FILE. Needs torch from 2.11 on, a CUDA device, and no network.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.device.telling import MARK
from bench.entry import Options, Table

NAME = "device"
TITLE = "What a GPU tells in a few minutes"
DEVICES = ()  # only where it is asked for by name

ROOT = Path(__file__).parents[2]


USUAL_MINUTES = 11.0
"""Of more, each part gets its share."""


@dataclass(frozen=True)
class Part:
    """A module of bench.device.

    Attributes:
        name: of the module.
        seconds: how long it may take.
        least: with less time left it is not begun.
    """

    name: str
    seconds: float
    least: float


PARTS = (
    Part("card", 40, 10),
    Part("gpu_tests", 90, 25),
    Part("exactness", 100, 30),
    Part("whole_run", 130, 40),
    Part("speed", 150, 50),
    Part("sharing", 45, 25),
    Part("attention_order", 60, 25),
    Part("anatomy", 45, 25),
    Part("gpu_tests_compiled", 400, 30),
)


def run(options: Options) -> Table:
    """Every part that there is time for."""
    table = Table(columns={"part": "", "seconds": ".0f", "how": "", "findings": ""})
    until = time.monotonic() + 60 * options.minutes
    record = None if options.json is None else options.json.with_suffix(".parts.jsonl")
    ended = _ended(record)
    share = max(1.0, options.minutes / USUAL_MINUTES)
    for part in PARTS:
        left = until - time.monotonic()
        if part.name in ended:
            table.rows.append({"part": part.name, "how": "done before", "findings": 0})
        elif left < part.least:
            table.rows.append({"part": part.name, "how": "left out: no time", "findings": 0})
        else:
            limit = min(share * part.seconds, left)
            print(f"\n== {part.name}, {limit:.0f} s at most", flush=True)
            table.rows.append(_run(part, limit, options, record))
    return table


def command_of(part: Part, options: Options) -> list[str]:
    """The program of a part."""
    return [sys.executable, "-m", "bench.device", part.name, *(["--quick"] if options.quick else [])]


def _run(part: Part, limit: float, options: Options, record: Path | None) -> dict[str, Any]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "core", "cli", "tests"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), path])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    }
    began = time.monotonic()
    process = subprocess.Popen(
        command_of(part, options),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    findings, rest = [], []
    for line in _lines(process, began + limit):
        other, mark, told = line.partition(MARK)  # a test runner's dot may stand before it
        if other:
            rest.append(other)
        if not mark:
            continue
        finding = json.loads(told)
        findings.append(finding)
        print(f"[{time.monotonic() - began:5.1f}] {finding['line']}", flush=True)
        _keep(record, {"part": part.name, "finding": finding})
    how = _end(process)
    if process.returncode:
        print("\n".join(rest[-12:]), flush=True)
    seconds = time.monotonic() - began
    _keep(record, {"part": part.name, "how": how, "seconds": seconds, "output": "\n".join(rest)[-6000:]})
    print(f"== {part.name}: {how} after {seconds:.0f} s", flush=True)
    return {"part": part.name, "seconds": seconds, "how": how, "findings": len(findings), "all": findings}


def _lines(process: "subprocess.Popen[bytes]", until: float) -> Any:
    """What a process prints, line by line, until it has ended or the time is up."""
    assert process.stdout is not None
    held, selector = b"", selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    while (left := until - time.monotonic()) > 0:
        if not selector.select(left):
            break
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            break
        *lines, held = (held + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    yield held.decode(errors="replace")


def _end(process: "subprocess.Popen[bytes]") -> str:
    """How a process ended; with all that it started it is killed where it has not."""
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "cut off at its limit"
    return "ended" if process.returncode == 0 else f"failed with exit code {process.returncode}"


def _keep(record: Path | None, fact: dict[str, Any]) -> None:
    if record is not None:
        with record.open("a") as file:
            file.write(json.dumps(fact) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _ended(record: Path | None) -> set[str]:
    """Parts that an earlier call was through with."""
    if record is None or not record.exists():
        return set()
    facts = [json.loads(line) for line in record.read_text().splitlines()]
    return {fact["part"] for fact in facts if fact.get("how") == "ended"}
