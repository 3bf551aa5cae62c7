"""Kill and terminate `critic-train fit` at random, start it again, and see whether anything is lost.

    OMP_NUM_THREADS=1 python bench/soak.py --data rollouts/train --held-out rollouts/val --kills 200 --terms 50

One run goes undisturbed. Then run after run is started by the same command, in a process of its own, and that process
gets SIGKILL or SIGTERM after CPU time drawn at random, as often as the run needs to reach its end. After each signal
every checkpoint that stands must be whole and the newest may not be older than before; at the end of each run weights,
optimizer, trainer state, metrics.jsonl and the choice of the best must be those of the undisturbed run, bit for bit.
It goes on until so many signals have been sent or --minutes have passed, and prints one JSON object; exit 1 if
anything was lost.

Processes are forked from one that has imported everything, so that signals fall on the run and not on imports.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
SETTINGS = ["--preset", "tiny", "--max-steps", "24", "--batch-size", "16", "--checkpoint-every", "3", "--device", "cpu"]
SETTINGS += ["--eval-every", "8", "--keep", "2", "--old-values", "epoch"]


def start(arguments: list[str], log: str) -> None:
    """The program, in a process of its own, its words going to a file."""
    from critic_train_cli.main import run

    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["critic-train", *arguments]
    run()


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has had; 0 where it is gone."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0


def final_state(out: Path) -> dict[str, str]:
    """Digests of all that must be bit-identical when a run has ended."""
    from critic_train.run.checkpoint import checkpoints

    last = checkpoints(out / "checkpoints")[-1]
    names = ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json")
    files = {name: last / name for name in names} | {"metrics.jsonl": out / "metrics.jsonl"}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return digests | {"checkpoint": last.name, "best": (out / "best").readlink().name}


@dataclass(slots=True)
class Soak:
    """What has been done and found so far."""

    arguments: list[str]
    folder: Path
    left: Counter[signal.Signals]
    draw: random.Random
    context: Any
    seconds: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    def start(self, out: Path) -> BaseProcess:
        """Start the run in `out`, or go on with it."""
        process: BaseProcess = self.context.Process(
            target=start, args=(["fit", "--out", str(out), *self.arguments], str(out) + ".log")
        )
        process.start()
        return process

    def undisturbed(self) -> dict[str, str]:
        """The run that nobody disturbs; notes how much CPU time it takes."""
        process = self.start(self.folder / "undisturbed")
        while process.is_alive():
            self.seconds = max(self.seconds, cpu_seconds(process.pid or 0))
            time.sleep(0.02)
        if process.exitcode != 0:
            raise SystemExit((self.folder / "undisturbed.log").read_text())
        return final_state(self.folder / "undisturbed")

    def disturbed(self, number: int, expected: dict[str, str], until: float) -> None:
        """One run from its start to its end, or to the end of the time, through as many signals as it takes."""
        out = self.folder / f"run-{number}"
        newest = 0
        while time.monotonic() < until:
            process = self.start(out)
            self._disturb(process, out)
            process.join()
            self.exits[str(process.exitcode)] += 1
            newest = self._look(out, newest)
            if process.exitcode == 0:
                self.runs += 1
                found = final_state(out)
                self.faults += [f"run {number}: {name} differs" for name in expected if found[name] != expected[name]]
                return
            if process.exitcode not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                self.faults.append(
                    f"run {number}: exit {process.exitcode}: {Path(str(out) + '.log').read_text()[-500:]}"
                )
                return

    def _disturb(self, process: BaseProcess, out: Path) -> None:
        """Send the next signal after CPU time drawn at random, unless the process ends before."""
        if not +self.left:
            return
        number = self.draw.choices(list(self.left), weights=list(self.left.values()))[0]
        moment = self.draw.uniform(0.0, 0.6 * self.seconds)
        while process.is_alive():
            if cpu_seconds(process.pid or 0) >= moment:
                self.stages[stage_of(out)] += 1
                os.kill(process.pid or 0, number)
                self.sent[number.name] += 1
                self.left[number] -= 1
                return
            time.sleep(0.002)

    def _look(self, out: Path, before: int) -> int:
        """See that every checkpoint is whole and none is lost; returns the newest one's step."""
        from critic_train.run.checkpoint import checkpoint_step, checkpoints, inspect

        standing = checkpoints(out / "checkpoints")
        for path in standing:
            found = inspect(path)
            if found.kind != "complete":
                self.faults.append(f"{out.name}: {path.name} is {found.kind}: {found.fault}")
        newest = max((checkpoint_step(path) or 0 for path in standing), default=0)
        if newest < before:
            self.faults.append(f"{out.name}: step {before} is lost, {newest} is the newest")
        return newest


def stage_of(out: Path) -> str:
    """What a run is doing, as far as its directory shows."""
    if list((out / "checkpoints").glob(".*.tmp-*")):
        return "saving or pruning"
    if not (out / "cache" / "train" / "read_as.json").exists():
        return "starting or reading"
    return "training or evaluating"


def main() -> None:
    """Soak and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["critic_train.training.fit", "critic_train_cli.main", "critic_train_cli.command_results"]
    )
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(
            arguments=["--data", chosen.data, "--val-data", chosen.held_out, *SETTINGS],
            folder=Path(temporary),
            left=Counter({signal.SIGKILL: chosen.kills, signal.SIGTERM: chosen.terms}),
            draw=random.Random(chosen.seed),
            context=context,
        )
        expected = soak.undisturbed()
        until = time.monotonic() + 60 * chosen.minutes
        number = 0
        while +soak.left and time.monotonic() < until:
            number += 1
            soak.disturbed(number, expected, until)
            print(f"{number} runs, {dict(soak.sent)}, {len(soak.faults)} faults", file=sys.stderr, flush=True)
    result = {
        "signals": dict(soak.sent),
        "sent_while": dict(soak.stages),
        "exits": dict(soak.exits),
        "runs_finished": soak.runs,
        "undisturbed_cpu_seconds": round(soak.seconds, 2),
        "faults": soak.faults,
    }
    print(json.dumps(result, indent=2))
    raise SystemExit(bool(soak.faults))


if __name__ == "__main__":
    main()
